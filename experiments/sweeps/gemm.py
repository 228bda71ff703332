"""Launches of the matrix kernels, and cuBLAS beside them:  python experiments/sweeps/gemm.py OUT.json

First every candidate of gemm_candidates.py runs twice, in several processes, which fills Triton's cache, and is
compared with float64: one that is off, not repeatable, or needs more than the GPU has, takes no further part. Then,
each in a CUDA graph, medians of 5 replays (of 9 for the chain in the end):

`single M NAME`: a product of few rows, 72 calls over 36 weights; ours with what follows the product, cuBLAS without.
Microseconds, fastest first.
`chain M`: ten denoising steps of 18 layers, 720 products that read what the one before them wrote. `choice` starts
with the fastest single launches, and keeps another one of the best 4, or the best of a family, where the chain becomes
faster. Milliseconds; `same`: of 20 replays how many are bitwise what it is without programmatic dependent launch. All
values stay of order one.
`gemm NAME`: a product of many rows over weights that exceed the L2; cuBLAS's product with its bias, cuBLAS with all
that follows (an operation each), and each launch. Microseconds.

About a minute on an H200. skinny_chain.py measures the chain of the committed launches again.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from pi0exp.experiments.skinny_chain import LAYERS, SMALLER, STEPS
from pi0exp.experiments.sweeps import common
from pi0exp.experiments.sweeps.common import Captured, medians_ms
from pi0exp.experiments.sweeps.gemm_candidates import (
    LARGE,
    LARGE_ROWS,
    ROWS,
    SKINNY,
    Product,
    large_candidates,
    short,
    skinny_candidates,
)
from pi0exp.kernels import gemm as large
from pi0exp.kernels import gemm_cases, gemm_epilogue
from pi0exp.kernels import skinny_gemm as skinny

DEVICE = torch.device("cuda", 0)
WEIGHTS = 36
"""Of a shape: together several times the L2 of an H200 (60 MiB) for each shape."""
LARGE_BYTES = 3e8
"""Of the weights of a large product, five times that L2."""
Launch = skinny.Launch | large.Launch
Job = tuple[int, str, str, Launch]
"""Rows, name, family, launch."""


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).bfloat16()


def weight(name: str, product: Product, seed: int) -> Tensor:
    """Scaled so that products are of order one, and less where they are added to the chain's residual stream."""
    return normal(product.C, product.K, seed=seed, scale=SMALLER.get(name, 1.0) * product.K**-0.5)


def extras(M: int, product: Product) -> tuple[Tensor | None, Tensor | None]:
    """Bias and residual."""
    return (
        normal(product.C, seed=3) if product.bias else None,
        normal(M, product.N, seed=8) if product.residual else None,
    )


def run(
    launch: Launch, product: Product, x: Tensor, w: Tensor, counters: Tensor, bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """The product by one launch, past the launch tables of the ops."""
    M, K, y = x.shape[0], product.K, x.new_empty((x.shape[0], product.N))
    if isinstance(launch, skinny.Launch):
        with set_wrap_triton_enabled(False):
            return skinny.launched(
                launch, x, w, counters, y, bias, residual, None, 1, product.activation, product.gated
            )  # fmt: skip
    large.tile_gemm_kernel[(triton.cdiv(M, launch.BM) * triton.cdiv(product.N, launch.BN),)](
        x, w, y, bias, residual, None, M, product.N, K, x.stride(0), 1,
        **launch.constants(), ACTIVATION=product.activation, GATED=product.gated, EVEN_K=K % launch.BK == 0,
        UPCAST=False, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y


# ---- which candidates are right


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@cache
def _truth(M: int, name: str) -> tuple[tuple[Any, ...], Tensor, float]:
    """Arguments, the result in float64, and the allowed error: twice that of cuBLAS in bfloat16, and one rounding."""
    product = (SKINNY | LARGE)[name]
    x, w, (bias, residual) = normal(M, product.K, seed=2), weight(name, product, 1), extras(M, product)
    doubles = [None if one is None else one.double() for one in (x, w, bias, residual)]
    exact = gemm_epilogue.reference(*doubles, None, product.activation, product.gated)
    theirs = gemm_cases.cublas(x, w, bias, residual, None, product.activation, product.gated)
    return (product, x, w, bias, residual), exact, 2 * _error(theirs, exact) + 2.0**-9


def wrong(job: Job) -> str:
    """In a process of the pool: why a candidate is none, empty for a good one."""
    M, name, _, launch = job
    try:
        counters = torch.zeros(skinny.COUNTERS, dtype=torch.int32, device=DEVICE)
        (product, x, w, bias, residual), exact, limit = _truth(M, name)
        first, second = (run(launch, product, x, w, counters, bias, residual) for _ in range(2))
        off, same = _error(first, exact), torch.equal(first, second) and not counters.any()
    except Exception as error:  # of the compiler or the driver: whatever it is, the candidate is out
        return common.why(error)
    if not off <= limit:
        return f"error {off:.2e} > {limit:.2e}"
    return "" if same else "not repeatable, or counters left"


# ---- time


def single(M: int, name: str, jobs: list[Job], weights: list[Tensor], counters: Tensor) -> tuple[float, list[Any]]:
    """Microseconds of cuBLAS's product, and (microseconds, family, launch) of each candidate, fastest first."""
    product, x = SKINNY[name], normal(M, SKINNY[name].K, seed=7)
    _, residual = extras(M, product)

    def us(call: Callable[[Tensor], Tensor]) -> float:
        graph = Captured(lambda: [call(w) for w in weights * 2])
        return medians_ms({"": graph}, 5)[""] / (2 * WEIGHTS) * 1e3

    cublas_us = us(lambda w: F.linear(x, w))
    ranked = [
        (us(lambda w, launch=launch: run(launch, product, x, w, counters, None, residual)), family, launch)
        for rows, one, family, launch in jobs
        if (rows, one) == (M, name)
    ]
    return cublas_us, sorted(ranked, key=lambda one: one[0])


def chain(
    launches: dict[str, Launch], weights: dict[str, list[Tensor]], counters: Tensor, x0: Tensor
) -> Callable[[], Tensor]:
    def product(name: str, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run(launches[name], SKINNY[name], x, weights[name][layer], counters, None, residual)

    def call() -> Tensor:
        for _ in range(STEPS):
            x = x0
            for layer in range(LAYERS):
                x = product("out", layer, product("qkv", layer, x)[:, :2048], x)
                x = product("down", layer, product("gate_up", layer, x), x)
        return x

    return call


def cublas_chain(weights: dict[str, list[Tensor]], x0: Tensor, epilogues: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        for _ in range(STEPS):
            x = x0
            for layer in range(LAYERS):
                qkv, out, gate_up, down = (weights[name][layer] for name in SKINNY)
                attended = F.linear(F.linear(x, qkv)[:, :2048], out)
                x = x + attended if epilogues else attended
                gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
                hidden = F.gelu(gate, approximate="tanh") * up if epilogues else gate
                x = x + F.linear(hidden, down) if epilogues else F.linear(hidden, down)
        return x

    return call


def chosen(
    ranked: dict[str, list[Any]], weights: dict[str, list[Tensor]], counters: Tensor, x0: Tensor
) -> dict[str, Launch]:
    """The launches of the fastest chain that was found, shape by shape."""

    def ms(launches: dict[str, Launch]) -> float:
        return medians_ms({"": Captured(chain(launches, weights, counters, x0))}, 5)[""]

    choice = {name: ranked[name][0][2] for name in SKINNY}
    least = ms(choice)
    for name in ("gate_up", "down", "qkv", "out"):
        of_family = {family: launch for _, family, launch in reversed(ranked[name])}
        tried = {choice[name]}
        for launch in [*(launch for *_, launch in ranked[name][1:4]), *of_family.values()]:
            if launch not in tried and (now := ms(choice | {name: launch})) < least:
                least, choice = now, choice | {name: launch}
            tried.add(launch)
    return choice


def chain_times(
    choice: dict[str, Launch], weights: dict[str, list[Tensor]], counters: Tensor, x0: Tensor
) -> dict[str, Any]:
    plain = {name: replace(launch, pdl=False) for name, launch in choice.items()}
    graphs = {
        "cuBLAS, products only": Captured(cublas_chain(weights, x0, False)),
        "cuBLAS + gelu, residual": Captured(cublas_chain(weights, x0, True)),
        "best": Captured(chain(choice, weights, counters, x0)),
        "best without PDL": Captured(chain(plain, weights, counters, x0)),
    }
    ms, same = medians_ms(graphs, 9), 0
    expected, best = graphs["best without PDL"].out, graphs["best"]
    if not torch.isfinite(expected).all():
        raise RuntimeError("the chain's values overflow, so that its comparison would say nothing")
    for _ in range(20):
        best.out.zero_()
        best.graph.replay()
        same += torch.equal(best.out, expected)
    return {"ms": ms, "same": same, "choice": {name: asdict(launch) for name, launch in choice.items()}}


def large_us(name: str, jobs: list[Job], counters: Tensor) -> dict[str, float]:
    """Microseconds of cuBLAS and of each candidate."""
    product, M = LARGE[name], LARGE_ROWS[name.split()[0]]
    count = max(2, int(LARGE_BYTES // (2 * product.C * product.K)))
    weights, x = [weight(name, product, seed) for seed in range(count)], normal(M, product.K, seed=7)
    bias, residual = extras(M, product)
    more = (bias, residual, None, product.activation, product.gated)
    graphs = {
        "cublas product": Captured(lambda: [F.linear(x, w, bias) for w in weights]),
        "cublas all": Captured(lambda: [gemm_cases.cublas(x, w, *more) for w in weights]),
    }
    for launch in (launch for _, one, _, launch in jobs if one == name):
        graphs[short(launch)] = Captured(
            lambda launch=launch: [run(launch, product, x, w, counters, bias, residual) for w in weights]
        )
    return {contestant: ms / count * 1e3 for contestant, ms in medians_ms(graphs, 5).items()}


def sweep(keep: Callable[[Any], None]) -> None:
    jobs: list[Job] = [(M, name, *one) for M in ROWS for name in SKINNY for one in skinny_candidates(M, SKINNY[name])]
    for name, product in LARGE.items():
        jobs += [(LARGE_ROWS[name.split()[0]], name, "tiles", launch) for launch in large_candidates(product)]
    workers = max(2, min(14, (os.cpu_count() or 4) - 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        reasons = list(pool.map(wrong, jobs))
    for job, reason in zip(jobs, reasons, strict=True):
        if reason:
            print(f"  out: {job[1]}, {job[0]} rows, {short(job[3])}: {reason}")
    good = [job for job, reason in zip(jobs, reasons, strict=True) if not reason]
    print(f"{len(good)} of {len(jobs)} candidates")
    counters, found = torch.zeros(skinny.COUNTERS, dtype=torch.int32, device=DEVICE), {}
    weights = {name: [weight(name, SKINNY[name], seed) for seed in range(WEIGHTS)] for name in SKINNY}
    for M in ROWS:
        ranked = {}
        for name in SKINNY:
            cublas_us, ranked[name] = single(M, name, good, weights[name], counters)
            us, _, launch = ranked[name][0]
            print(f"{M} {name}: cuBLAS's product {cublas_us:.2f} us; {us:.2f} us {short(launch)}", flush=True)
            kept = [(us, family, asdict(launch)) for us, family, launch in ranked[name]]
            found[f"single {M} {name}"] = {"cublas_us": cublas_us, "ranked": kept}
            keep(found)
        x0 = normal(M, 1024, seed=7)
        found[f"chain {M}"] = chain_times(chosen(ranked, weights, counters, x0), weights, counters, x0)
        print(f"{M} chain: {found[f'chain {M}']}", flush=True)
        keep(found)
    for name in LARGE:
        found[f"gemm {name}"] = large_us(name, good, counters)
        print(f"{name}, us: {found[f'gemm {name}']}", flush=True)
        keep(found)


def main(words: list[str]) -> int:
    return common.run(str(__doc__), sweep, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
