"""Tables of what the sweeps of experiments/sweeps/ and `python experiments/skinny_chain.py` wrote.

Kernels are imported where a table needs their launches, as Triton is there on Linux only.
"""

import ast
from dataclasses import asdict
from statistics import median
from typing import Any

from pi0exp.experiments.tables.benches import read
from pi0exp.experiments.tables.points import NONE_YET, machine_line, markdown, records

ATTENTION, ATTENTION_NUMBERS = ("shape", "fastest SDPA backend"), ("us", "SDPA us", "SDPA takes")
GEMM = ("rows", "product", "ours includes")
GEMM_NUMBERS = ("us", "fastest us", "cuBLAS product us", "it takes", "cuBLAS with all of it us", "that takes")
NORMS, NORMS_NUMBERS = ("kernel", "case", "fastest launch"), ("us", "GB/s", "of copy")
CHAIN, CHAIN_NUMBERS = ("rows",), ("cuBLAS ms", "ours ms", "without dependent launch ms", "cuBLAS takes", "the same")
OURS = "ours, `us`, with the launch that the kernel's file has now"
COPY, CEILINGS = "ceilings/copy_tb_per_s", "stacks"
"""A metric, and the study whose points measured it."""


def attention(name: str) -> str:
    """A row a shape of experiments/times/<name>.json: the launch that the kernels have now, and the best of SDPA.

    `-` where that launch was not timed.
    """
    if (found := read(name)) is None:
        return NONE_YET
    rows: dict[str, list[str]] = {}
    timed: dict[str, tuple[float, str]] = {}
    for record in found["found"]:
        case = record["case"]
        now = _attention_launch(found["fingerprint"]["arch"], case)
        rows.setdefault(case, [case, "-", "-", "-", "-"])
        if "us" in record and record.items() >= now.items():
            timed[case] = record["us"], " *"
        if "final" in record:
            timed.update((case, (us, "")) for us, launch in record["final"] if launch == now)
            # A shape may be swept twice, the other time with launches or an op that it does not have now.
            if case in timed and rows[case][1] == "-":
                us, mark = timed[case]
                sdpa_us, backend = min(record["libraries"])
                rows[case] = [case, backend, f"{us:.2f}{mark}", f"{sdpa_us:.2f}", f"{sdpa_us / us:.2f} x"]
    rounds = "Medians of 7 rounds; * of the 3 first rounds, as it was not among the best four then"
    blind = "A backend that takes no mask attends with the blind state token in a call of its own"
    return (
        f"{machine_line([found['fingerprint']])}; {OURS}. {rounds}. {blind}.\n\n"
        f"{markdown(ATTENTION, ATTENTION_NUMBERS, [*rows.values()])}"
    )


def gemm(name: str) -> str:
    """A row a product: the launch that the kernels have now, the fastest that was tried, and cuBLAS."""
    if (found := read(name)) is None:
        return NONE_YET
    from pi0exp.experiments.sweeps.gemm_candidates import LARGE, LARGE_ROWS, ROWS, SKINNY

    arch, data, rows = found["fingerprint"]["arch"], found["found"], []
    for M in sorted(ROWS):
        for one, product in SKINNY.items():
            single = data[f"single {M} {one}"]
            now = _skinny_launch(arch, M, product)
            us = next((us for us, _, launch in single["ranked"] if launch == now), None)
            cells = [str(M), f"{one}, {product.C} x {product.K}", product.epilogue()]
            rows.append([*cells, *_beside(us, single["ranked"][0][0], single["cublas_us"], None)])
    for one, product in LARGE.items():
        M, us = LARGE_ROWS[one.split()[0]], dict(data[f"gemm {one}"])
        plain, whole = us.pop("cublas product"), us.pop("cublas all")
        cells = [str(M), f"{one}, {product.C} x {product.K}", product.epilogue()]
        rows.append([*cells, *_beside(us.get(_large_launch(arch, M, product)), min(us.values()), plain, whole)])
    return (
        f"{machine_line([found['fingerprint']])}; {OURS}. Products apart, not in a chain; those of few rows got the "
        "launch that made the chain fastest. cuBLAS's product includes the bias.\n\n"
        f"{markdown(GEMM, GEMM_NUMBERS, rows)}"
    )


def norms(name: str) -> str:
    """A row a case: the fastest launch, the rate of the least bytes, and its share of the copy rate of the points."""
    if (found := read(name)) is None:
        return NONE_YET
    tb_per_s, about = _copy_rate(found["fingerprint"]["gpu"])
    rows = []
    for row in found["found"]["rows"]:
        us, launch = min(one for one in row["rank"] if one[1] != "table")
        rate = row["bytes"] / us / 1e3
        words = ", ".join(f"{key} {value}" for key, value in ast.literal_eval(launch).items())
        share = "-" if tb_per_s is None else f"{rate / tb_per_s / 10:.0f} %"
        rows.append([row["kernel"], row["case"], words, f"{us:.2f}", f"{rate:.0f}", share])
    return (
        f"{machine_line([found['fingerprint']])}; {about}. The launch that was fastest for each case; a kernel's "
        "file has one for each kind of shape. A case of a few megabytes is bound by its start, or stays in the L2.\n\n"
        f"{markdown(NORMS, NORMS_NUMBERS, rows)}"
    )


def chain(name: str) -> str:
    """A row for each number of rows: milliseconds of the chain, and how many replays were bitwise the same."""
    if (found := read(name)) is None:
        return NONE_YET
    rows, counts = [], set()
    for M, one in ((key[2:], value) for key, value in found.items() if key.startswith("M=")):
        ms = [one["ms"][contestant] for contestant in ("cublas", "ours", "ours without dependent launch")]
        counts.add(len(one["samples_ms"]["ours"]))
        rows.append([M, *(f"{value:.3f}" for value in ms), f"{one['speedup']:.2f} x", f"{one['same_of_20']} of 20"])
    rounds = " or ".join(map(str, sorted(counts)))
    return (
        f"{machine_line([found['fingerprint']])}; {rounds} rounds. cuBLAS computes the products alone.\n\n"
        f"{markdown(CHAIN, CHAIN_NUMBERS, rows)}"
    )


# ---- the launches of today


def _attention_launch(arch: str, name: str) -> dict[str, Any]:
    """As `attention_launch.launch_for` chooses on a GPU of that architecture."""
    import torch

    from pi0exp.experiments.sweeps.attention import CASES
    from pi0exp.kernels.attention_launch import FEW_ROWS, LAUNCHES
    from pi0exp.kernels.kernel import arguments_of

    q_BTNH, stage = arguments_of(CASES[name][1], torch.device("cpu"))[0], name.partition(",")[0]
    key = "gfx" if arch.startswith("gfx") else arch if arch in LAUNCHES else "other"
    table, few = LAUNCHES[key], f"{stage}, few rows"
    return asdict(table[few if few in table and q_BTNH.shape[1] * q_BTNH.shape[2] <= FEW_ROWS else stage])


def _skinny_launch(arch: str, M: int, product: Any) -> dict[str, Any]:
    import torch

    from pi0exp.kernels import skinny_gemm

    return asdict(skinny_gemm.launch_for(arch, torch.bfloat16, M, product.C, product.K))


def _large_launch(arch: str, M: int, product: Any) -> str:
    import torch

    from pi0exp.experiments.sweeps.gemm_candidates import short
    from pi0exp.kernels import gemm

    return short(gemm.launch_for(arch, torch.bfloat16, M, product.C, product.K, product.gated))


# ---- cells


def _beside(us: float | None, fastest: float, product: float, whole: float | None) -> list[str]:
    """Ours now, the fastest of ours, cuBLAS's product and what it takes of ours, cuBLAS with all and the same."""

    def takes(theirs: float | None) -> list[str]:
        if theirs is None:
            return ["-", "-"]
        return [f"{theirs:.2f}", "-" if us is None else f"{theirs / us:.2f} x"]

    return ["-" if us is None else f"{us:.2f}", f"{fastest:.2f}", *takes(product), *takes(whole)]


def _copy_rate(gpu: str) -> tuple[float | None, str]:
    """TB/s of a copy, and where it comes from."""
    found = [one for some in records(CEILINGS).values() for one in some if one["fingerprint"]["gpu"] == gpu]
    rates = [one["metrics"][COPY] for one in found if COPY in one["metrics"]]
    if not rates:
        return None, f"no point of `{CEILINGS}` measured the copy rate of this GPU"
    return median(rates), f"copy {median(rates):.2f} TB/s, the median of {len(rates)} points of `{CEILINGS}`"
