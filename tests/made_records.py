"""Result files as a measurement would leave them, with the noise that a test asks for, and a store of such records;
and what the commands that read them say when they refuse."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pi0exp import compose, subject
from pi0exp.load import write_record
from pi0exp.point import experiment_of, run_params
from pi0exp.result import Outcome, Result, record
from pi0exp.timing import percentile, summary
from pi0exp.track import Record, Store

PRINTS = {"gpu": "CPU", "driver": "1.2", "versions": {"torch": "2.11.0"}, "date": "2026-01-02", "commit": "abcdef"}
KEY = "a" * 16


def times(p50_ms: float, seed: int, count: int = 100) -> list[float]:
    """Samples that scatter by 0.3 %."""
    noise = np.random.default_rng(seed).standard_normal(count)
    return [float(value) for value in p50_ms * np.exp(0.003 * noise)]


@cache
def _asked(*words: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Parameters and experiment; composing takes half a second."""
    plain = compose.from_words(["model=tiny", "measure.device=cpu", *words])
    return run_params(plain, subject.subject(plain)), experiment_of(plain)


def made(
    *words: str,
    p50_ms: float = 10.0,
    seed: int = 0,
    key: str = KEY,
    study: str = "toy",
    error: float = 0.004,
    numerics: str = "REORDERED",
    outcome: Outcome = Outcome.OK,
    reasons: tuple[str, ...] = (),
    metrics: dict[str, float] | None = None,
    **prints: Any,
) -> Record:
    """The record of `words`, of the tiny model where they name none. prints: of the fingerprint, gpu="Toy GPU"."""
    params, experiment = deepcopy(_asked(*words))
    numbers: dict[str, float] = {"error/rel_l2": error, "error/rel_l2_plain_bf16": 0.007}
    samples: dict[str, list[float]] = {}
    if outcome is Outcome.OK:
        samples["latency_ms"] = times(p50_ms, seed)
        numbers |= summary(samples["latency_ms"])
        numbers["throughput_hz"] = 1e3 / percentile(samples["latency_ms"], 50)
    result = Result(
        outcome,
        list(reasons),
        numerics,
        metrics=numbers | (metrics or {}),
        samples=samples,
        fingerprint=PRINTS | prints,
    )
    return record(key, study, params, experiment, result)


def keep(folder: Path, *words: str, **more: Any) -> Path:
    """A file in `folder`. Processes of one point have one key, and need a folder each."""
    return write_record(made(*words, **more), folder)


def store(root: Path, *records: Record) -> list[str]:
    """A store of these as runs, the first one first; the ids of the runs."""
    opened = Store.open(root=root)
    ids = []
    for one in records:
        name = one["params"].get("stack", one["key"])
        ids.append(opened.start(one["study"], name, one["key"], one["params"], {"numerics": one["numerics"]}))
        opened.finish(ids[-1], one)
    return ids


def refusal(capsys: Any, main: Callable[[list[str]], int], *words: object) -> str:
    """The only line of a command that ends with exit code 2."""
    capsys.readouterr()
    code = main([*map(str, words)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("pi0exp: ")
    return str(line.removeprefix("pi0exp: "))
