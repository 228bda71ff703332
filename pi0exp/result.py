"""What a measurement leaves behind: an outcome, and numbers only where the outcome allows them."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a point ended. Failures are results too."""

    OK = "ok"
    UNSUPPORTED = "unsupported"
    WRONG_NUMERICS = "wrong_numerics"
    UNPROVEN = "unproven"
    OOM = "oom"
    TIMEOUT = "timeout"
    ERROR = "error"
    INTERRUPTED = "interrupted"

    @property
    def exit_code(self) -> int:
        return _EXIT_CODES[self]

    @property
    def settled(self) -> bool:
        """The point need not be measured again by the same code on the same machine."""
        return self in (Outcome.OK, Outcome.UNSUPPORTED)


_EXIT_CODES = {
    Outcome.OK: 0,
    Outcome.UNSUPPORTED: 3,
    Outcome.WRONG_NUMERICS: 4,
    Outcome.UNPROVEN: 4,
    Outcome.OOM: 5,
    Outcome.TIMEOUT: 5,
    Outcome.ERROR: 5,
    Outcome.INTERRUPTED: 130,
}
CONFIG_ERROR = 2
"""Exit code of what cannot be composed or read: configuration, input, a store that cannot be written."""

TIMED = (
    *("latency_ms/", "latency_host_ms/", "latency_paced_ms/", "stage_ms/", "sampling/", "throughput_hz"),
    *("power_w/", "energy_j/", "perf_per_watt", "roofline/share", "kernels_", "gpu/", "gemm/"),
    *("case_us/", "case_ratio/", "case_share/", "case_tflop_per_s/", "cases/"),
)
"""Prefixes of the metrics that only a correct and proven run may carry."""


@dataclass(frozen=True)
class Result:
    """One measured point.

    reasons: one sentence each, why the outcome is what it is. applied: option group -> what it did to the subject.
    metrics: final numbers, named group/name with the unit in the group. samples: every single measurement.
    facts: what else one must know to read the numbers, e.g. tokens=stand-in. fingerprint: machine and versions.
    log: the end of the child's output where it failed. files: name -> text that is kept beside them.
    """

    outcome: Outcome
    reasons: list[str] = field(default_factory=list)
    numerics: str = ""
    applied: dict[str, list[str]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcome", Outcome(self.outcome))
        timed = [name for name in self.metrics if name.startswith(TIMED)]
        if self.outcome is Outcome.OK and "latency_ms/p50" not in self.metrics:
            raise ValueError("a result that is ok must carry latency_ms/p50")
        if self.outcome is not Outcome.OK and (timed or self.samples):
            raise ValueError(f"a result that is {self.outcome} must not carry {', '.join(timed) or 'samples'}")
        if self.outcome is not Outcome.OK and not self.reasons:
            raise ValueError(f"a result that is {self.outcome} must say why")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outcome": str(self.outcome)}


def measured_at(record: dict[str, Any]) -> str:
    """When it was measured, to be sorted by. Older records say the day only, which comes before all times of it."""
    prints = record["fingerprint"]
    return str(prints.get("time") or prints.get("date") or "")


def record(key: str, study: str, params: dict[str, str], experiment: dict[str, Any], result: Result) -> dict[str, Any]:
    """The JSON form in which a point is stored, committed and carried to other machines."""
    return {"format": 1, "key": key, "study": study, "params": params, "experiment": experiment, **result.to_dict()}
