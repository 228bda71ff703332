"""What the tests of the search share: machines, and measurements that were made up."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest

from pi0exp import compose
from pi0exp.machine import Machine
from pi0exp.search.narrow import narrowed
from pi0exp.search.space import Space, space

CPU = Machine()
H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90")


COMPOSE = cache(compose.option_node)


def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every space asks for every option, which does not change meanwhile."""
    monkeypatch.setattr(compose, "option_node", lambda group, name: deepcopy(COMPOSE(group, name)))


def space_of(*words: str, machine: Machine = CPU) -> Space:
    with compose.session():
        left = narrowed(["study=search", "model=tiny", *words])
    return space(compose.from_words(left.base), left, machine)


def measured(
    ms: float, joules: float | None = None, outcome: str = "ok", numerics: str = "REORDERED"
) -> dict[str, Any]:
    """What the run of a point returns, as far as a search reads it."""
    metrics = {"latency_ms/p50": ms, "latency_ms/p50_low": 0.99 * ms, "latency_ms/p50_high": 1.01 * ms}
    metrics |= {"energy_j/call": joules} if joules is not None else {}
    metrics |= {"error/rel_l2": 7e-3, "error/rel_l2_plain_bf16": 7.2e-3}
    return {
        "key": f"{abs(hash((ms, joules))):016x}"[:16],
        "outcome": outcome,
        "numerics": numerics,
        "reasons": [] if outcome == "ok" else ["made up"],
        "metrics": metrics if outcome == "ok" else {},
        "params": {"model": "tiny", "workload": "default"},
        "fingerprint": {"gpu": "Toy GPU", "date": "2026-11-25", "versions": {"torch": "2.13"}, "commit": "c0ffee"},
        "exit_code": 0 if outcome == "ok" else 5,
    }


class Log:
    """A measurement that keeps what it was asked, and answers by a rule."""

    def __init__(self, rule: Callable[[str], dict[str, Any]]) -> None:
        self.rule, self.asked = rule, list[str]()

    def __call__(self, words: Sequence[str]) -> dict[str, Any]:
        self.asked.append(" ".join(words))
        return self.rule(self.asked[-1])


def cost_ms(words: str) -> float:
    """Of a stack on a made-up machine: each of some options takes something off."""
    return 100.0 - 20 * ("attention=sdpa" in words) - 10 * ("image_masking=skip" in words) - words.count("rewrites")
