"""Choose the launches of a denoising step on this GPU:  python -m pi0exp.kernels.tune [--rows 16 64] [--out FILE]

First every candidate is compared with its reference at Pi0's sizes and run twice, in several processes, which fills
Triton's cache: one that is off, not repeatable, or needs more than the GPU has, takes no further part. Then the chain
that a step is, 18 layers of five launches whose weights exceed the L2, is captured with one launch changed at a time,
name by name, twice around; what makes the whole chain fastest is kept. Milliseconds of a chain, medians of 9 replays
that take turns with the best so far. About two minutes on an H200.

It writes tables/<architecture>.json beside this file, which `stream_launch` reads: launches, the date, the machine, and
as evidence what every candidate took; also how long the chain takes with the launches to begin with, and without
dependent launch, and of how many replays the results were bitwise the same.

Exit codes: 0; 2 a wrong word; 3 no GPU.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pi0exp import pipes
from pi0exp.kernels import bench, stream_launch
from pi0exp.kernels.gemm_epilogue import arch_of
from pi0exp.kernels.kernel import INTERPRETED, Case, Kernel, check, discover, results
from pi0exp.kernels.skinny_gemm import COUNTERS, Launch
from pi0exp.kernels.stream_launch import TABLES, Attend, plain
from pi0exp.kernels.tune_candidates import HEAD_DIM, HEADS, HIDDEN, SIZES, WIDTH, candidates, names
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.result import CONFIG_ERROR, Outcome

LAYERS = 18
REPLAYS, SAME = 9, 20
"""Replays of a time, and replays that are compared bit by bit."""
Table = dict[str, Launch | Attend]


# ---- which candidates are right


def case_of(rows: int, name: str) -> tuple[Kernel, Case]:
    """The kernel, and the case of its shape with most branches: a horizon of 10 or 50."""
    op = name.split()[0]
    kernel = discover()[op]
    tokens = SIZES[rows][0]
    wanted = {
        "stream_qkv": f"denoise {tokens} behind",
        "stream_gated": f"denoise, {tokens} rows",
        "stream_attention": f"denoise, {tokens} actions" + (" without" if rows == 16 else ", prompt"),
    }
    start = wanted.get(op, f"{'out' if name.endswith(f'x{HEADS * HEAD_DIM}') else 'down'}, {tokens} rows")
    return kernel, next(case for case in kernel.cases if case.name.startswith(start))


def wrong(job: tuple[int, str, Launch | Attend]) -> str:
    """In a process of the pool: why a candidate is none, empty for a good one."""
    rows, name, launch = job
    device = torch.device("cuda", 0)
    try:
        stream_launch.launches(arch_of(device))[name] = launch
        kernel, case = case_of(rows, name)
        found = [one.wrong for one in check(kernel, case, device) if one.wrong]
        given = case.make(torch.Generator(device).manual_seed(0), device)
        first, second = ([x.clone() for x in results(kernel.op, case, given)] for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not given[-1].any()
        return "; ".join(found) or ("" if same else "not repeatable, or counters left")
    except Exception as error:  # of the compiler or the driver: whatever it is, the candidate is out
        return f"{type(error).__name__}: {error}".splitlines()[0][:150]


# ---- the chain


class Chain:
    """A step's layers with weights of their own and everything that they read, on one device."""

    def __init__(self, rows: int, device: torch.device, layers: int = LAYERS):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        self.tokens, self.prefix = SIZES[rows]
        qkv, mixed = (HEADS + 2) * HEAD_DIM, HEADS * HEAD_DIM
        self.weights = [
            (
                normal(qkv, WIDTH, scale=WIDTH**-0.5),
                normal(WIDTH, mixed, scale=0.1 * mixed**-0.5),
                normal(2 * HIDDEN, WIDTH, scale=WIDTH**-0.5),
                normal(WIDTH, HIDDEN, scale=0.1 * HIDDEN**-0.5),
            )
            for _ in range(layers)
        ]
        self.rooms = [normal(1, self.prefix + self.tokens, 2, 1, HEAD_DIM) for _ in range(layers)]
        self.x = normal(1, self.tokens, WIDTH, dtype=torch.float32)
        self.scale, self.turn = normal(WIDTH, dtype=torch.float32), normal(1, self.tokens, 1, HEAD_DIM)
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def __call__(self) -> Tensor:
        from pi0exp.kernels.stream_attention import stream_attention
        from pi0exp.kernels.stream_ends import stream_begin
        from pi0exp.kernels.stream_gated import stream_gated
        from pi0exp.kernels.stream_qkv import stream_qkv
        from pi0exp.kernels.stream_residual import stream_residual

        counters, scale, prefix = self.counters, self.scale, self.prefix
        x, xs, squares = stream_begin(self.x, scale, self.weights[0][0])
        for i, ((qkv, out, gate_up, down), room) in enumerate(zip(self.weights, self.rooms, strict=True)):
            k, v = room.unbind(2)
            following = self.weights[(i + 1) % len(self.weights)][0]
            q = stream_qkv(xs, squares, qkv, None, self.turn, self.turn, k, v, prefix, 1e-6, counters, gate_up)
            mixed = stream_attention(q, k, v, None, False, HEAD_DIM**-0.5, prefix, counters, out)
            x, xs, squares = stream_residual(mixed.flatten(2), out, x, None, scale, counters, down)
            hidden = stream_gated(xs, squares, gate_up, None, 1e-6, counters, following)
            x, xs, squares = stream_residual(hidden, down, x, None, scale, counters)
        assert isinstance(x, Tensor)
        return x


def captured(chain: Chain) -> tuple[Any, Tensor]:
    """A CUDA graph of the chain, which has run once outside, and what the chain returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    return graph, out


def medians_ms(chain: Chain, table: Table, variants: Sequence[Table]) -> list[float]:
    """Of the chain with each variant of the table in its place; the variants take turns."""
    graphs, before = [], dict(table)
    for variant in variants:
        table.update(variant)
        graphs.append(captured(chain)[0])
        table.clear()
        table.update(before)
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(REPLAYS):
        for graph, some in zip(graphs, samples, strict=True):
            some.append(bench.sample_us(graph, chain.x.device) / 1e3)
    return [median(some) for some in samples]


def descend(
    start: Table,
    tried: dict[str, list[Launch | Attend]],
    time: Callable[[Sequence[Table]], list[float]],
    rounds: int = 2,
) -> tuple[Table, dict[str, list[Any]]]:
    """The best table found by changing one name at a time, and (ms, launch) of every candidate, fastest first.

    time: milliseconds with each of several tables, the best so far first.
    """
    best, evidence = dict(start), dict[str, list[Any]]()
    for _ in range(rounds):
        for name, launches in tried.items():
            others = [one for one in launches if one != best[name]]
            ms = time([dict(best), *(best | {name: one} for one in others)])
            ranked = sorted(zip(ms, [best[name], *others], strict=True), key=lambda pair: pair[0])
            evidence[name] = [(value, asdict(one)) for value, one in ranked]
            best[name] = ranked[0][1]
    return best, evidence


def repeated(chain: Chain) -> int:
    """Of SAME replays, how many gave bitwise what the chain gives without dependent launch."""
    table = stream_launch.launches(arch_of(chain.x.device))
    before = dict(table)
    table.update({name: plain(launch) for name, launch in before.items()})
    expected = chain().clone()
    table.update(before)
    graph, out = captured(chain)
    same = 0
    for _ in range(SAME):
        out.zero_()
        graph.replay()
        same += torch.equal(out, expected)
    return same


# ---- the command


def tune(rows: Sequence[int], device: torch.device) -> dict[str, Any]:
    table = stream_launch.launches(arch_of(device))
    jobs = [(M, name, one) for M in rows for name in names(M) for one in candidates(M, name)]
    workers = max(1, min(14, (os.cpu_count() or 4) - 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        reasons = list(pool.map(wrong, jobs))
    for (M, name, launch), reason in zip(jobs, reasons, strict=True):
        if reason:
            print(f"  out: {name} at {M} rows, {launch}: {reason}")
    found: dict[str, Any] = {"launches": {}, "evidence": {}, "chains": {}}
    for M in rows:
        tried = {
            name: [job[2] for job, reason in zip(jobs, reasons, strict=True) if job[:2] == (M, name) and not reason]
            for name in names(M)
        }
        chain = Chain(M, device)
        start = {name: launches[0] for name, launches in tried.items()}
        best, evidence = descend(start, tried, partial(medians_ms, chain, table))
        table.update(best)
        begin, tuned, without = medians_ms(
            chain, table, [start, best, {name: plain(one) for name, one in best.items()}]
        )  # fmt: skip
        found["chains"][str(M)] = {
            "start_ms": begin, "ms": tuned, "without_dependent_launch_ms": without, "same": repeated(chain), "of": SAME
        }  # fmt: skip
        found["launches"] |= {name: asdict(one) for name, one in best.items()}
        found["evidence"] |= evidence
        print(f"{M} rows: {found['chains'][str(M)]}", flush=True)
    return found


def main(words: list[str]) -> int:
    title, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.kernels.tune", description=title, epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", choices=sorted(SIZES), default=sorted(SIZES),
                        help="padded rows: 16 for a horizon of 10, 64 for one of 50")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes; default: the one that is read")
    given = parser.parse_args(words)
    if INTERPRETED or not torch.cuda.is_available():
        why = "TRITON_INTERPRET=1 runs kernels on the CPU" if INTERPRETED else "torch can use none here"
        print(f"{parser.prog}: needs a GPU, and {why}", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    device = torch.device("cuda", 0)
    out = given.out or TABLES / f"{arch_of(device)}.json"
    if given.out is not None and not out.absolute().parent.is_dir():
        print(f"{parser.prog}: --out {out}: its folder does not exist", file=sys.stderr)
        return CONFIG_ERROR
    out.parent.mkdir(exist_ok=True)
    about = {"date": datetime.now(UTC).date().isoformat(), "command": sys.orig_argv}
    bench.write(out, about | {"fingerprint": fingerprint(this_machine())} | tune(given.rows, device))
    print(f"written to {out}")
    return Outcome.OK.exit_code


if __name__ == "__main__":
    pipes.leave(lambda: main(sys.argv[1:]))
