"""Wall-clock time of a point, by what its process says it is doing."""

import pytest

from pi0exp.phases import Phases


def test_seconds_go_to_what_was_said_last():
    times = iter([0.0, 10.0, 11.0, 13.0, 16.0, 20.0, 25.0])
    told: list[str] = []
    phases = Phases(told.append, lambda: next(times))
    said = ["verify: truth", "build", "verify: plain model", "which is no phase", "warm up", "measure 1/30  p50 1 ms"]
    for text in said:
        phases(text)
    assert told == said
    expected = {"start": 10.0, "verify": 1.0 + 3.0, "build": 2.0, "warm_up": 4.0, "measure": 5.0, "total": 25.0}
    assert phases.metrics() == pytest.approx({f"wall_s/{name}": seconds for name, seconds in expected.items()})
