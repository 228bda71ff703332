"""A GPU's timeline, each instant of it given to one slice or to none.

Slices overlap: on several streams, and in a chain of dependent launches (NVIDIA's programmatic dependent launch), where
a kernel begins while the one in front still runs, reads its weights, and waits. Sums of such durations count an instant
as often as there are slices in it. Here an instant belongs to the slice that began first and still runs: in a chain it
does the work for which the others wait. What is left of a slice is its own time. Own times add up to the time in which
anything runs; with the idle time they are the whole span.

What that hides: work that a slice does beside one that began before it, such as the weights that it reads ahead, is in
the time of the other. In a chain each kernel gives what it reads ahead to the one in front, and is slowed down by what
the one behind it reads. On independent streams whose slices truly share the GPU, the one that began first has the time
of both, and one that runs within another has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pi0exp.slices import Slice


@dataclass(frozen=True)
class Extent:
    """Microseconds. span: from the first start to the last end; busy: of it, where something runs; overlap: where two
    slices or more run."""

    span_us: float
    busy_us: float
    overlap_us: float


class _Bounds(NamedTuple):
    start_us: float
    end_us: float


def _bounds(one: Slice) -> _Bounds:
    assert one.start_us is not None
    return _Bounds(one.start_us, one.end_us)


def own(slices: Sequence[Slice]) -> list[Slice]:
    """The slices in the order in which they began, each with its own time alone: no two overlap.

    Of two that begin together the shorter one comes first, whatever the order of the file. A slice within another has a
    duration of 0 and stands at the end of the other.
    """
    made, reached = list[Slice](), float("-inf")
    for one in sorted(slices, key=_bounds):
        start, end = _bounds(one)
        if start >= reached:
            made.append(one)
        else:
            made.append(replace(one, start_us=reached, duration_us=max(end - reached, 0.0)))
        reached = max(reached, end)
    return made


def extent(slices: Sequence[Slice]) -> Extent:
    """By counting how many run between two bounds: another way than that of own, which is judged by this one."""
    bounds = [_bounds(one) for one in slices]
    changes = sorted([(start, 1) for start, _ in bounds] + [(end, -1) for _, end in bounds])
    running, busy, overlap = 0, 0.0, 0.0
    before = changes[0][0]
    for instant, change in changes:
        busy += (instant - before) if running else 0.0
        overlap += (instant - before) if running > 1 else 0.0
        running, before = running + change, instant
    return Extent(changes[-1][0] - changes[0][0], busy, overlap)
