"""Where the time of a denoising step in one launch goes: clocks at the meetings of its programs.

python experiments/phases.py OUT.json [stream_layers] [stream_ring] [stream_wide] [--rounds N]

Each kernel on its first case, 18 layers of 11 rows, or of 51: checked against its reference, called again for the same
bits, timed in a graph of ten steps, kernels in turns; and called with clocks. Microseconds at the clock that the GPU
reports, means over all layers but three at either end:

    work     between being let through and coming, of the median program; slowest: of the slowest
    wait     the least that any program waits between coming and being let through: what a meeting costs by itself
    whole    both together, of the median program: the rest of it is waiting for the slowest

Exit codes: 0; 1 a kernel is wrong; 2 wrong words; 3 no GPU that they run on.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from pi0exp.fusion.fusion import HOPPER
from pi0exp.graphs.capture import Graph
from pi0exp.kernels.kernel import Kernel, arguments_of, check
from pi0exp.kernels.stream_layers import KERNELS as REGISTERS
from pi0exp.kernels.stream_ring import KERNELS as RING
from pi0exp.kernels.stream_wide import KERNELS as WIDE
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.result import CONFIG_ERROR, Outcome
from pi0exp.timing import device_sample_ms
from pi0exp.whole import write_whole

NAMES = ("qkv", "attention", "mixing", "out", "hidden", "down")
"""The phases of a layer, each of which follows a meeting."""
WIDE_NAMES = ("qkv", "attention", "mixing", "out", "sum of out", "hidden", "down", "sum of down")
"""Those of `stream_wide`."""
STEPS, EDGE, REPEATS, BUSY = 10, 3, 20, 400
KNOWN: dict[str, Kernel] = {kernel.name: kernel for kernel in (*REGISTERS, *RING, *WIDE)}


def phases_of(clocks: Tensor, per_us: float, names: tuple[str, ...] = NAMES) -> dict[str, dict[str, float]]:
    """Of clocks [2 PHASES L, programs], ticks per_us a microsecond: phase -> work, slowest, wait, whole."""
    # Of each meeting: when a program came, when it was let through. A phase ends with coming to the next meeting.
    came, through = clocks.double().view(-1, 2, clocks.shape[1]).unbind(1)
    work, wait = came[1:] - through[:-1], through[1:] - came[1:]
    layers = len(came) // len(names)
    found = {}
    for i, name in enumerate(names):
        rows = [len(names) * layer + i for layer in range(EDGE, layers - EDGE)]
        found[name] = {
            "work": mean(float(work[row].median()) for row in rows) / per_us,
            "slowest": mean(float(work[row].max()) for row in rows) / per_us,
            "wait": mean(float(wait[row].min()) for row in rows) / per_us,
            "whole": mean(float((work[row] + wait[row]).median()) for row in rows) / per_us,
        }
    return found


def programs_of(kernel: Kernel, given: tuple[Any, ...], device: torch.device) -> int:
    """How many the kernel is launched with: those with a ring one a tile, whose weights they have in order, else one
    a multiprocessor."""
    tiles = 0 if kernel.name == "stream_layers" else len(given[1])
    return tiles or torch.cuda.get_device_properties(device).multi_processor_count


def measured(kernel: Kernel, device: torch.device) -> tuple[dict[str, Any], Callable[[int], None]]:
    """What checks and clocks say of a kernel; and a replay of ten steps."""
    case = kernel.cases[0]
    wrong = [f"{one.output}: {one.wrong}" for one in check(kernel, case, device) if one.wrong]
    given = arguments_of(case, device)
    first, _ = kernel.op(*given)
    differing = sum(not torch.equal(kernel.op(*given)[0], first) for _ in range(REPEATS))
    rooms, names = given[case.mutates[0]], WIDE_NAMES if kernel.name == "stream_wide" else NAMES
    meetings, programs = len(names) * len(rooms), programs_of(kernel, given, device)
    clocks = torch.zeros(2 * meetings, programs, dtype=torch.int64, device=device)
    for _ in range(BUSY):
        kernel.op(*given[:-1], clocks)
    mhz = torch.cuda.clock_rate(device)  # of a GPU at work
    torch.cuda.synchronize(device)
    found = {"wrong": wrong, "differing": differing, "mhz": mhz, "phases": phases_of(clocks.cpu(), mhz, names)}

    def steps() -> Tensor:
        return [kernel.op(*given)[0] for _ in range(STEPS)][-1]

    graph = Graph(steps, 2, lambda line: None)

    def replay(index: int, reads: object = given) -> None:  # what the graph reads must live as long as its replays
        graph.replay()

    return found, replay


def main(arguments: list[str] | None = None) -> int:
    usage, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(description=usage, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="all samples and phases")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: {' '.join(KNOWN)}")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each; default 30")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.kernels if name not in KNOWN]:
        print(f"phases: {unknown[0]}: no such kernel; there are {', '.join(KNOWN)}", file=sys.stderr)
        return CONFIG_ERROR
    if reasons := HOPPER.unmet(this_machine()):
        print(f"phases: {reasons[0]}", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    device, names = torch.device("cuda", 0), given.kernels or list(KNOWN)
    made: dict[str, Any] = {"command": ["experiments/phases.py", *names], "fingerprint": fingerprint(this_machine())}
    with torch.inference_mode():
        found = {name: measured(KNOWN[name], device) for name in names}
        samples: dict[str, list[float]] = {name: [] for name in names}
        for index in range(given.rounds):
            for name, (_, replay) in found.items():
                samples[name].append(device_sample_ms(replay, index, device) / STEPS)
    for name, (one, _) in found.items():
        made[name] = one | {"ms_a_step": samples[name]}
        print(f"{name}: {median(samples[name]):.4f} ms a step; {len(one['wrong'])} wrong, {one['differing']} differing")
        for phase, times in one["phases"].items():
            print(f"    {phase:11}" + "".join(f" {what} {us:5.2f}" for what, us in times.items()))
    write_whole(given.out, json.dumps(made, indent=1).encode())
    return int(any(one["wrong"] or one["differing"] for one, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
