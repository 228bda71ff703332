"""Made-up records of every kind that the report shows. Their numbers are made to be told apart, not to be believed."""

from functools import cache
from typing import Any

import numpy as np

from pi0exp import compose, config, point, subject
from pi0exp.kernel_table import CATEGORIES
from pi0exp.report import document, sources
from pi0exp.report.document import Chapter
from pi0exp.report.study import Study
from pi0exp.result import Outcome, Result, record
from pi0exp.timing import steadiness, summary
from pi0exp.track import Record

H200 = {
    "gpu": "NVIDIA H200",
    "vendor": "nvidia",
    "arch": "sm_90",
    "driver": "1.2",
    "versions": {"torch": "2.11.0"},
    "date": "2026-01-02",
    "commit": "abcdef0123456789",
}
MI350 = H200 | {"gpu": "AMD Instinct MI350X", "vendor": "amd", "arch": "gfx950"}
RUNGS = {
    "0_eager": 160.0,
    "1_graphs": 40.0,
    "2_sdpa": 36.0,
    "3_skip": 36.1,
    "4_projections": 30.0,
    "5_cameras": 28.0,
    "6_prefix": 25.0,
    "7_hoists": 22.0,
    "8_compiled": 17.0,
}


@cache
def composed(*words: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Parameters and experiment of these words."""
    plain = compose.from_words(words)
    return point.run_params(plain, subject.subject(plain)), point.experiment_of(plain)


def timed(p50: float, calls: int = 60, spread: float = 0.004) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and samples of calls that take about p50 milliseconds; their median is exactly that."""
    samples = p50 * (1 + spread * np.random.default_rng(7).standard_normal(calls))
    samples = [float(one) for one in samples * p50 / np.median(samples)]
    made = summary(samples) | steadiness(samples) | {"latency_ms/p50": p50, "latency_host_ms/p50": p50 + 0.7}
    return made | {"throughput_hz": 1e3 / p50}, {"latency_ms": samples}


def rich(p50: float, watts: float = 500.0) -> dict[str, float]:
    """What a run on a GPU has beside its times: ceilings, floors, stages, power, kernels."""
    shares = dict(zip(CATEGORIES, (0.55, 0.1, 0.08, 0.07, 0.05, 0.08, 0.05, 0.02), strict=True))
    made = {f"kernels_ms/{name}": 0.92 * p50 * share for name, share in shares.items()}
    made |= {f"kernels_share/{name}": share for name, share in shares.items()}
    made |= {"ceilings/copy_tb_per_s": 4.2, "ceilings/matrix_tflop_per_s": 790.0}
    made |= {"ceilings/copy_sustained_tb_per_s": 4.1, "ceilings/matrix_sustained_tflop_per_s": 660.0}
    made |= {"roofline/floor_ms": 6.1, "roofline/share": 6.1 / p50}
    made |= {"stage_ms/vision": 0.15 * p50, "stage_ms/prefill": 0.45 * p50, "stage_ms/denoise": 0.4 * p50}
    energy = watts * p50 / 1e3
    made |= {"power_w/mean": watts, "energy_j/call": energy, "energy_j/uncertainty": 0.02 * energy}
    return made | {"perf_per_watt": 1e3 / p50 / watts}


def made(
    study: str,
    words: tuple[str, ...],
    p50: float,
    *,
    metrics: dict[str, float] | None = None,
    error: float = 0.005,
    numerics: str = "REORDERED",
    prints: dict[str, Any] = H200,
    calls: int = 60,
    facts: dict[str, str] | None = None,
) -> Record:
    """A point that is ok."""
    params, experiment = composed(*words)
    times, samples = timed(p50, calls)
    errors = {"error/rel_l2": error, "error/rel_l2_plain_bf16": 0.007, "error/ratio_max": error / 0.007}
    result = Result(
        Outcome.OK,
        numerics=numerics,
        metrics=errors | times | (metrics or {}),
        samples=samples,
        facts=facts or {},
        fingerprint=dict(prints),
    )
    return record(key(study, *words, str(p50)), study, params, experiment, result)


def failed(study: str, words: tuple[str, ...], outcome: Outcome, reason: str) -> Record:
    params, experiment = composed(*words)
    result = Result(outcome, [reason], numerics="REORDERED", fingerprint=dict(H200))
    return record(key(study, *words), study, params, experiment, result)


def key(*parts: str) -> str:
    import hashlib

    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def ladder() -> list[Record]:
    """Nine rungs on two workloads; one is slower than the one below, one failed, one stack computes other actions."""
    found = []
    for workload, factor in (("default", 1.0), ("masked", 0.85)):
        for name, p50 in RUNGS.items():
            words = (f"stack={name}", f"workload={workload}")
            if (name, workload) == ("5_cameras", "masked"):
                found.append(failed("ladder", words, Outcome.OOM, "the device ran out of memory"))
                continue
            numerics = "EXACT" if name in ("0_eager", "1_graphs") else "REORDERED"
            watts = 250 + 2500 / p50
            found.append(made("ladder", words, p50 * factor, metrics=rich(p50 * factor, watts), numerics=numerics))
    words = ("stack=fork_best", "workload=masked")
    found.append(
        made(
            "ladder", words, 13.0, metrics=rich(13.0, 520), error=0.43, numerics="APPROXIMATE", facts={"clocks": "held"}
        )
    )
    return found


def batches() -> list[Record]:
    """Batch 1 to 64 of two stacks."""
    found = []
    for stack, p50 in (("2_sdpa", 36.0), ("8_compiled", 17.0)):
        for batch in (1, 2, 4, 8, 16, 32, 64):
            time = p50 * (0.3 + 0.7 * batch**0.95)
            metrics = rich(time, 650) | {
                "throughput_hz": 1e3 * batch / time,
                "roofline/share": 0.2 + 0.05 * np.log2(batch),
            }
            words = (f"stack={stack}", f"workload.batch_size={batch}")
            found.append(made("batch_scaling", words, time, metrics=metrics))
    return found


def configured(**values: Any) -> config.ReportConfig:
    return config.report({"report": values})


def at(time: str) -> dict[str, Any]:
    """The machine at an hour of its day; "" where a record does not say it."""
    return H200 | ({"time": f"2026-01-02T{time}:00:00+00:00"} if time else {})


def chaptered(study: Study, records: list[Record]) -> Chapter:
    return document.chapter(study, sources.sorted_out(records), [])
