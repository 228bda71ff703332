"""What a graph's replay hides: which stage and which matrix product each of its kernels belongs to.

A graph is launched as a whole, so a profiler sees its kernels without the operations that launched them. The same call
with its kernels launched one by one shows both. A captured stream replays its kernels in the order of their capture:
where the names of both calls agree one by one, the replay's kernels are told by the launched ones; where they do not,
nothing is told.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pi0exp.kernel_table import category_of
from pi0exp.slices import Kind, Slice, Trace


@dataclass(frozen=True)
class Told:
    """A trace with as much told as can be. stages: how they were told apart; "" where they were not, and `why`."""

    trace: Trace
    stages: str
    why: str = ""


RANGES = "ranges around the functions of a stage"
ORDER = "order of the kernels of the same call launched one by one"


def tell(trace: Trace) -> Told:
    """Stages and products of every slice of the trace, where its ranges or its launched call tell them."""
    if trace.calls is None:
        return Told(trace, "", "the file does not mark calls and stages")
    if any(one.stage for one in trace.slices):
        how = RANGES
    elif any(one.stage for one in trace.launched):
        how = ORDER
    else:
        return Told(trace, "", "the call is replayed as a whole, and the trace has no launched call to compare it with")
    if not trace.launched:
        return Told(trace, how)
    told: list[Slice] = []
    for call in _calls(trace):
        pairs = align(call, trace.launched)
        if isinstance(pairs, str):
            return Told(trace, RANGES) if how is RANGES else Told(trace, "", pairs)
        told += _between([_with(one, other) for one, other in zip(call, pairs, strict=True)])
    return Told(replace(trace, slices=told), how)


def _calls(trace: Trace) -> Iterator[list[Slice]]:
    for number in sorted({one.call for one in trace.slices if one.call is not None}):
        yield [one for one in trace.slices if one.call == number]


def align(replayed: list[Slice], launched: list[Slice]) -> list[Slice | None] | str:
    """For each slice of the replay the launched one, or None for what only the replay has; or why they do not agree.

    Only the replay has the copies of its inputs and outputs. Copies and fills are left out, since a graph may run a
    copy as a kernel and the other way round.
    """
    wanted = [one for one in launched if one.kind is Kind.kernel]
    found: list[Slice | None] = []
    place = 0
    for one in replayed:
        if one.kind is not Kind.kernel:
            found.append(None)
        elif place < len(wanted) and wanted[place].name == one.name:
            found.append(wanted[place])
            place += 1
        elif category_of(one.name) == "copy":
            found.append(None)
        else:
            other = wanted[place].name if place < len(wanted) else "nothing more"
            where = f"the replay's kernel {place + 1} of {len(wanted)}"
            return f"{where} is {one.name[:60]}, the launched call's is {other[:60]}"
    if place < len(wanted):
        return f"the replay has {place} of the {len(wanted)} kernels of the launched call"
    return found


def _with(one: Slice, other: Slice | None) -> Slice:
    if other is None:
        return one
    stage = one.stage or other.stage
    return replace(one, stage=stage) if one.product else replace(one, stage=stage, op=other.op, product=other.product)


def _between(call: list[Slice]) -> list[Slice]:
    """A copy that no range and no partner tells belongs to the stage in whose midst it runs."""
    before, made = "", list[Slice]()
    after = [""] * (len(call) + 1)
    for i in range(len(call) - 1, -1, -1):
        after[i] = call[i].stage if call[i].kind is Kind.kernel else after[i + 1]
    for i, one in enumerate(call):
        if one.kind is Kind.kernel:
            before = one.stage
        made.append(replace(one, stage=before) if not one.stage and before == after[i] else one)
    return made
