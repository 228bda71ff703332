"""Check and time kernels on this GPU:  python -m pi0exp.kernels.bench [NAME ...] [--json FILE] [--quick]

For every case of the policy: microseconds of the op, the rate of its least work, that work's time at this run's own
ceilings as a share of the op's, and how many times longer others take: `eager` is the op's reference as it stands,
`compile` the same under torch.compile, and then a library's kernels. Whatever does not agree with the reference in
float64 (see `pi0exp.kernels.kernel.compare`) is not timed.

A sample is the mean over the calls of one CUDA graph, which take turns on several sets of arguments; gaps between
kernels are part of it. The contestants alternate, round by round; the median of the rounds is shown. Shares above 100 %
are possible where the data stays in L2, as it does in the policy.

Exit codes: 0; 2 an unknown name; 3 no GPU; 4 wrong numbers of an op; 5 an error of any contestant.
"""

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from pi0exp import pipes
from pi0exp.ceilings import burst_ceilings
from pi0exp.errors import UserError
from pi0exp.gpu_lock import taken_here
from pi0exp.kernels.kernel import INTERPRETED, Case, Comparison, Kernel, arguments_of, check, discover
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.result import CONFIG_ERROR, Outcome
from pi0exp.roofline import Ceilings

OP = "op"
_LEAST_US = 2.0
"""No kernel in a graph takes less; bounds the calls of a graph together with the case's least work."""


@dataclass(frozen=True)
class Settings:
    """rounds: samples of a contestant. replay_us: how long a graph runs at least, about. compiled: whether
    torch.compile takes part. ceilings_s: for the ceilings."""

    rounds: int = 15
    replay_us: float = 2000.0
    compiled: bool = True
    ceilings_s: float = 2.0


QUICK = Settings(rounds=7, replay_us=500.0, compiled=False, ceilings_s=0.5)


@dataclass
class Contestant:
    """state: ok, wrong, error, or declined (not made for this case); `reason` says why it is not ok.

    samples_us: one a round, none unless ok. comparisons: with the reference in float64.
    """

    name: str
    state: str = "ok"
    reason: str = ""
    samples_us: list[float] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A case as it was measured. sets: of arguments; calls: in a graph."""

    kernel: str
    case: str
    flops: float
    bytes_moved: float
    sets: int
    calls: int
    contestants: list[Contestant]

    def us(self, name: str) -> float | None:
        """The contestant's median in microseconds, None where it was not timed."""
        found = next((c for c in self.contestants if c.name == name), None)
        return median(found.samples_us) if found and found.samples_us else None


class Work(Protocol):
    """A case, or whatever else has a least work."""

    @property
    def flops(self) -> float: ...
    @property
    def bytes_moved(self) -> float: ...


def least_us(case: Work, ceilings: Ceilings) -> float:
    """The case's least work at the ceilings, whichever of memory and arithmetic takes longer."""
    return 1e6 * max(case.bytes_moved / ceilings.bytes_per_s, case.flops / ceilings.flops_per_s)


def set_count(bytes_moved: float, l2_bytes: int) -> int:
    """Argument sets to take turns: at least 8 where a case fits L2, else 2 or more that exceed three times L2."""
    return 8 if bytes_moved <= l2_bytes else max(2, math.floor(3 * l2_bytes / bytes_moved) + 1)


def call_count(case: Work, sets: int, ceilings: Ceilings, replay_us: float) -> int:
    """Calls in a graph: a multiple of the sets, for `replay_us` if the case took its least time."""
    return sets * math.ceil(replay_us / max(least_us(case, ceilings), _LEAST_US) / sets)


def contestants(kernel: Kernel, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Who is timed, the op first."""
    found = {OP: kernel.op, "eager": kernel.reference}
    if compiled and kernel.not_compiled:
        found["compile"] = partial(_left_out, kernel.not_compiled)
    elif compiled:
        found["compile"] = torch.compile(kernel.reference, fullgraph=True, dynamic=False)
    return found | dict(kernel.libraries)


def _left_out(why: str, *arguments: Any) -> None:
    raise NotImplementedError(why)


def measure(kernel: Kernel, case: Case, device: torch.device, settings: Settings, ceilings: Ceilings) -> Row:
    """Checks, then times, every contestant on one case."""
    torch.compiler.reset()  # every case is compiled for itself, however many there are
    sets = set_count(case.bytes_moved, l2_bytes(device))
    calls = call_count(case, sets, ceilings, settings.replay_us)
    all_calls = contestants(kernel, settings.compiled)
    row = Row(kernel.name, case.name, case.flops, case.bytes_moved, sets, calls, [Contestant(n) for n in all_calls])
    for contestant in row.contestants:
        with recorded(contestant):
            contestant.comparisons = check(kernel, case, device, all_calls[contestant.name])
            if wrong := [f"{c.output}: {c.wrong}" for c in contestant.comparisons if c.wrong]:
                contestant.state, contestant.reason = "wrong", "; ".join(wrong)
    torch.cuda.empty_cache()
    given = [arguments_of(case, device, seed) for seed in range(sets)]
    graphs = []
    for contestant in (c for c in row.contestants if c.state == "ok"):
        with recorded(contestant):
            graphs.append((contestant, captured(all_calls[contestant.name], given, calls, device)))
    for _ in range(settings.rounds):
        for contestant, graph in graphs:
            contestant.samples_us.append(sample_us(graph, device) / calls)
    return row


def l2_bytes(device: torch.device) -> int:
    """Of the GPU's L2 cache; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


@contextmanager
def recorded(contestant: Contestant) -> Iterator[None]:
    """An error of one contestant is kept, with its traceback on stderr, and the others go on."""
    try:
        yield
    except NotImplementedError as error:
        contestant.state, contestant.reason = "declined", str(error)
    except Exception as error:
        traceback.print_exc()
        contestant.state, contestant.reason = "error", f"{type(error).__name__}: {error}".splitlines()[0]


class Loop:
    """Calls on the sets in turn, one by one: what stands in the place of a graph on a CPU."""

    def __init__(self, call: Callable[..., Any], sets: list[tuple[Any, ...]], calls: int) -> None:
        self.call, self.sets, self.calls = call, sets, calls

    def replay(self) -> None:
        for i in range(self.calls):
            self.call(*self.sets[i % len(self.sets)])


def captured(call: Callable[..., Any], sets: list[tuple[Any, ...]], calls: int, device: torch.device) -> Any:
    """A CUDA graph of `calls` calls on the sets in turn, after all of them have run once outside."""
    if device.type != "cuda":
        return Loop(call, sets, calls)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for arguments in sets:
            call(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(*sets[i % len(sets)])
    return graph


def sample_us(graph: Any, device: torch.device) -> float:
    """Microseconds of a replay, behind another that keeps the device busy while this one is being launched."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        graph.replay()
        return 1e6 * (time.perf_counter() - start_s)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize(device)
    return 1e3 * float(start.elapsed_time(stop))


HEADER = f"{'kernel':<18} {'case':<44} {'us':>9} {'rate':>13} {'of ceiling':>10}  others take"


def line(row: Row, ceilings: Ceilings) -> str:
    """A row of the table. "others take": their time as a multiple of the op's, or why there is none."""
    name = f"{row.kernel:<18} {row.case:<44}"
    op = row.us(OP)
    if op is None:
        found = row.contestants[0]
        return f"{name} {found.state}: {found.reason}"
    memory_us, matrix_us = 1e6 * row.bytes_moved / ceilings.bytes_per_s, 1e6 * row.flops / ceilings.flops_per_s
    by_memory = memory_us >= matrix_us
    rate = f"{row.bytes_moved / op / 1e3:.0f} GB/s" if by_memory else f"{row.flops / op / 1e6:.1f} TFLOP/s"
    others = []
    for contestant in row.contestants[1:]:
        us = row.us(contestant.name)
        others.append(f"{contestant.name} " + (contestant.state if us is None else f"{us / op:.2f}"))
    return f"{name} {op:>9.2f} {rate:>13} {max(memory_us, matrix_us) / op:>10.1%}  {', '.join(others)}"


def report(
    rows: list[Row], ceilings: Ceilings, l2_bytes: int, settings: Settings, command: list[str]
) -> dict[str, Any]:
    """All of it as plain data, every sample among it."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprint(this_machine()) | {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "ceilings": asdict(ceilings),
        "l2_bytes": l2_bytes,
        "settings": asdict(settings),
        "rows": [asdict(row) | {"us": {c.name: row.us(c.name) for c in row.contestants}} for row in rows],
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """The file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def exit_code(rows: list[Row]) -> int:
    """What the contestants' states come to; an op with wrong numbers stands before an error."""
    if any(row.contestants[0].state == "wrong" for row in rows):
        return Outcome.WRONG_NUMERICS.exit_code
    if any(contestant.state == "error" for row in rows for contestant in row.contestants):
        return Outcome.ERROR.exit_code
    return Outcome.OK.exit_code


def parser() -> argparse.ArgumentParser:
    text, _, more = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        "python -m pi0exp.kernels.bench",
        description=text.split(":")[0],
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="a kernel; all of them where none is named")
    made.add_argument("--json", type=Path, metavar="FILE", help="keep all samples, the machine and the command there")
    made.add_argument("--quick", action="store_true", help=f"{QUICK.rounds} short rounds, and no torch.compile")
    return made


def main(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)
    known = discover()
    if unknown := sorted(set(given.names) - set(known)):
        print(f"no kernel {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return CONFIG_ERROR
    if given.json is not None and not given.json.absolute().parent.is_dir():
        print(f"--json {given.json}: its folder does not exist", file=sys.stderr)
        return CONFIG_ERROR
    try:
        with taken_here(not INTERPRETED, lambda text: print(text, file=sys.stderr, flush=True)):
            return bench(given, known)
    except UserError as error:
        print(f"pi0exp.kernels.bench: {error}", file=sys.stderr)
        return CONFIG_ERROR


def bench(given: argparse.Namespace, known: dict[str, Kernel]) -> int:
    """The command, with a GPU for itself alone. Returns the exit code."""
    if INTERPRETED or not torch.cuda.is_available():
        why = "TRITON_INTERPRET=1 runs kernels on the CPU" if INTERPRETED else "torch can use none here"
        print(f"pi0exp.kernels.bench needs a GPU, and {why}", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    settings, device = QUICK if given.quick else Settings(), torch.device("cuda", 0)
    ceilings = burst_ceilings(torch.bfloat16, device, settings.ceilings_s)
    torch.cuda.empty_cache()
    cache = l2_bytes(device)
    print(f"{torch.cuda.get_device_name(device)}: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
          f"matrix product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s, L2 {cache / 2**20:.0f} MiB")  # fmt: skip
    print(HEADER, flush=True)
    rows: list[Row] = []
    for name in given.names or known:
        for case in (c for c in known[name].cases if c.pi0):
            rows.append(measure(known[name], case, device, settings, ceilings))
            print(line(rows[-1], ceilings), flush=True)
            if given.json is not None:
                write(given.json, report(rows, ceilings, cache, settings, sys.orig_argv))
    return exit_code(rows)


if __name__ == "__main__":
    pipes.leave(lambda: main(sys.argv[1:]))
