"""Launches of the attention kernels, and PyTorch's SDPA beside them:  python experiments/sweeps/attention.py OUT.json

First every candidate runs once, in several processes, which fills Triton's cache, and is compared with the kernel's
reference: one that needs more than the GPU has, or is off, takes no further part. Then each shape: a CUDA graph of 40
calls that take turns on 8 sets of arguments, 3 rounds of all candidates; the best 4 again (`final`), 7 rounds, taking
turns with the SDPA backends that take the shape. Microseconds a call, medians without the first round. Shapes that are
not swept in full try the 8 best of the shape before them. `facts`: registers, spills and shared memory of a program,
and parts of the keys. About 50 s on an H200.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
import triton
from torch import Tensor

from pi0exp.experiments.sweeps import common
from pi0exp.kernels import attention_dense, attention_split
from pi0exp.kernels.attention import attend_kernel
from pi0exp.kernels.attention_cases import LIBRARIES
from pi0exp.kernels.attention_launch import Launch, attend_arguments, split_keys
from pi0exp.kernels.attention_split import attend_combine_kernel, combine_arguments
from pi0exp.kernels.bench import captured
from pi0exp.kernels.kernel import arguments_of

DEVICE = torch.device("cuda", 0)
SETS, CALLS = 8, 40
LARGEST_ERROR = 2.0**-7
"""Relative L2 error. Another launch is another order of summation in float32 and one rounding to bfloat16 (2**-9 at
most); a wrong one is off by about the size of the values."""
CASES = {
    case.name: (kernel, case)
    for kernel in (*attention_dense.KERNELS, *attention_split.KERNELS)
    for case in kernel.cases
    if case.pi0
}

VISION = [
    Launch(*given, tail=tail) for *given, tail in product((64, 128), (32, 64, 128), (4, 8), (1, 2), (True, False))
]
PREFILL = [Launch(*given) for given in product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
PREFILL_SPLIT = [Launch(*given) for given in product((64, 128), (32, 64), (4, 8), (1, 2), (132, 200, 300, 400))]
DENOISE = [
    Launch(m, n, warps, *more)
    for m, n, warps, *more in product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2), (66, 100, 132, 200, 264))
    if not (warps == 8 and m < 64) and not (m == 16 and n == 128)
]


class Sweep(NamedTuple):
    """split: whether by the op that splits the keys. launches: all that are tried; or BEST, those of the sweep before;
    or COMBINED, its best one with several rows to a program that combines parts."""

    case: str
    split: bool
    launches: list[Launch] | str


BEST, COMBINED = "best", "combined"


SWEEPS = (
    Sweep("vision, 3 cameras", False, VISION),
    Sweep("vision, 2 cameras", False, BEST),
    Sweep("vision, 1 camera", False, BEST),
    Sweep("prefill, 3 cameras", False, PREFILL),
    Sweep("prefill, middle camera absent", False, BEST),
    Sweep("prefill, 2 cameras", False, BEST),
    Sweep("prefill, prompt of 200", False, BEST),
    Sweep("prefill, 3 cameras", True, PREFILL_SPLIT),
    Sweep("denoise, 10 actions", True, DENOISE),
    Sweep("denoise, 10 actions without the state token", True, BEST),
    Sweep("denoise, middle camera absent", True, BEST),
    Sweep("denoise, 50 actions", True, DENOISE),
    Sweep("denoise, 50 actions, prompt of 200", True, BEST),
    Sweep("denoise, 10 actions", True, COMBINED),
)
COMBINED_ROWS = (1, 2, 4)


def parts_of(q_BTNH: Tensor, k_BSKH: Tensor, launch: Launch, split: bool) -> int:
    B, T, N, _ = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    return split_keys(triton.cdiv(T * N // K, launch.block_m) * B * K, S, launch) if split else 1


def distinct(launches: list[Launch], q_BTNH: Tensor, k_BSKH: Tensor, split: bool) -> list[Launch]:
    """The launches that differ in what they do to these shapes, and split the keys if they should."""
    seen: dict[Launch, Launch] = {}
    for launch in launches:
        parts = parts_of(q_BTNH, k_BSKH, launch, split)
        if parts > 1 or not split:
            seen.setdefault(replace(launch, programs=parts), launch)
    return list(seen.values())


def attend(
    launch: Launch, split: bool, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, keys_BS: Tensor | None, blind: bool,
    scale: float,
) -> tuple[Tensor, Any, int]:  # fmt: skip
    """What the op does, with a launch of ours: the result, the compiled kernel, and the parts of the keys."""
    out_BTNH = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format)
    parts = parts_of(q_BTNH, k_BSKH, launch, split)
    acc_BTNPH, stats = out_BTNH, out_BTNH
    if parts > 1:
        B, T, N, H = q_BTNH.shape
        acc_BTNPH = q_BTNH.new_empty((B, T, N, parts, H), dtype=torch.float32)
        stats = q_BTNH.new_empty((B, T, N, parts, 2), dtype=torch.float32)
    grid, named = attend_arguments(q_BTNH, k_BSKH, v_BSKH, keys_BS, blind, scale, launch, parts, acc_BTNPH, stats)
    compiled = attend_kernel[grid](**named)
    if parts > 1:
        grid, named = combine_arguments(acc_BTNPH, stats, out_BTNH, launch)
        attend_combine_kernel[grid](**named)
    return out_BTNH, compiled, parts


def tried(one: tuple[str, bool, Launch]) -> list[Any] | str:
    """In a process of the pool: the facts of a candidate, or why it is none."""
    name, split, launch = one
    kernel, case = CASES[name]
    try:
        given = arguments_of(case, DEVICE)
        out, compiled, parts = attend(launch, split, *given)
        truth = kernel.reference(*given).float()
        off = float((out.float() - truth).norm() / truth.norm())
    except Exception as error:  # of the compiler or the driver: whatever it is, the candidate is out
        return common.why(error)
    if not off <= LARGEST_ERROR:
        return f"wrong by {off:.2e}"
    return ["ok", compiled.n_regs, compiled.n_spills, compiled.metadata.shared, parts]


def medians_us(graphs: list[Any], rounds: int) -> list[float]:
    """Microseconds a call of each graph; they alternate, and the first round does not count."""
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds + 1):
        for graph, found in zip(graphs, samples, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop) * 1e3 / CALLS)
    return [median(found[1:]) for found in samples]


def libraries(sets: list[Any]) -> dict[str, Any]:
    """A graph of each SDPA backend that takes these arguments; the others' reasons are printed."""
    graphs = {}
    for name, call in LIBRARIES.items():
        try:
            call(*sets[0])
        except (NotImplementedError, RuntimeError) as error:
            print(f"  {name}: {common.why(error)}")
        else:
            graphs[name] = captured(call, sets, CALLS, DEVICE)
    return graphs


def timed(one: Sweep, launches: list[Launch], facts: dict[Any, Any]) -> tuple[list[Any], list[Launch]]:
    """The records of one shape, and its launches, fastest first."""
    sets = [arguments_of(CASES[one.case][1], DEVICE, seed) for seed in range(SETS)]

    def graph(launch: Launch) -> Any:
        return captured(lambda *given: attend(launch, one.split, *given)[0], sets, CALLS, DEVICE)

    graphs = {launch: graph(launch) for launch in launches}
    us = dict(zip(graphs, medians_us([*graphs.values()], 3), strict=True))
    order = sorted(us, key=us.__getitem__)
    last = order[:4]
    theirs = libraries(sets)
    final = medians_us([*(graphs[launch] for launch in last), *theirs.values()], 7)
    ours = sorted(zip(final, map(asdict, last), strict=False), key=lambda pair: pair[0])
    others = sorted(zip(final[len(last) :], theirs, strict=True))
    best = "; ".join(f"{value:.2f} us {launch}" for value, launch in ours[:1])
    print(f"{one.case}{', keys split' if one.split else ''}: {best} | {others}", flush=True)
    about = {"case": one.case, "split": one.split}
    records = [
        about | asdict(launch) | {"us": us[launch], "facts": facts.get((one.case, one.split, launch))}
        for launch in order
    ]
    return [*records, about | {"final": ours, "libraries": others}], order


def sweep(keep: Callable[[Any], None]) -> None:
    jobs = []
    for one in (one for one in SWEEPS if isinstance(one.launches, list)):
        q_BTNH, k_BSKH = arguments_of(CASES[one.case][1], torch.device("cpu"))[:2]
        jobs += [(one.case, one.split, launch) for launch in distinct(one.launches, q_BTNH, k_BSKH, one.split)]
    workers = max(2, min(15, (os.cpu_count() or 4) - 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        facts = dict(zip(jobs, pool.map(tried, jobs), strict=True))
    for (name, _, launch), found in facts.items():
        if isinstance(found, str):
            print(f"  out: {name}, {launch}: {found}")
    records: list[Any] = []
    order: list[Launch] = []
    for one in SWEEPS:
        if one.launches == BEST:
            launches = order[:8]
        elif one.launches == COMBINED:
            launches = [replace(order[0], combine_rows=rows) for rows in COMBINED_ROWS]
        else:
            own = [job for job in jobs if job[:2] == (one.case, one.split)]
            launches = [job[2] for job in own if not isinstance(facts[job], str)]
        found, order = timed(one, launches, facts)
        records += found
        keep(records)


def main(words: list[str]) -> int:
    return common.run(str(__doc__), sweep, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
