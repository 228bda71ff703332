"""What the sweeps share: the way in, the refusal without a GPU, what is kept, and medians of graphs that take turns."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pi0exp.gpu_lock import taken_here
from pi0exp.kernels import bench
from pi0exp.kernels.kernel import INTERPRETED
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.result import Outcome


def run(doc: str, sweep: Callable[[Callable[[Any], None]], None], words: list[str]) -> int:
    """Calls `sweep` with a function that keeps what was found so far in the file that `words` name.

    Returns the exit code: 0, or 3 without a GPU. SystemExit for other words than one file.
    """
    title, _, more = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.json")
    out = parser.parse_args(words).out
    if not out.absolute().parent.is_dir():
        parser.error(f"{out}: its folder does not exist")
    with taken_here(not INTERPRETED, lambda text: print(text, file=sys.stderr, flush=True)):
        if INTERPRETED or not torch.cuda.is_available():
            why = "TRITON_INTERPRET=1 runs kernels on the CPU" if INTERPRETED else "torch can use none here"
            print(f"{parser.prog}: needs a GPU, and {why}", file=sys.stderr)
            return Outcome.UNSUPPORTED.exit_code
        about = {"command": sys.orig_argv, "fingerprint": fingerprint(this_machine())}
        sweep(lambda found: bench.write(out, about | {"found": found}))
        return Outcome.OK.exit_code


class Captured:
    """A CUDA graph of one call, after the call has run once outside. out: what the call returned."""

    def __init__(self, call: Callable[[], Any]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = call()


def medians_ms(graphs: dict[str, Captured], rounds: int) -> dict[str, float]:
    """Milliseconds of a replay, each behind another one of the same graph; the graphs alternate, round by round."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(rounds):
        for name, one in graphs.items():
            samples[name].append(bench.sample_us(one.graph, device) / 1e3)
    return {name: median(some) for name, some in samples.items()}


def why(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:150]
