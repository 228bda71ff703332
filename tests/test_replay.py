"""Kernels of a replay against those of the same call launched one by one."""

from pathlib import Path

import pytest

from pi0exp.replay import ORDER, RANGES, align, tell
from pi0exp.slices import Kind, Product, Slice, Trace
from pi0exp.traces import read_trace

TRACES = Path(__file__).parent / "data" / "traces"
PRODUCT = Product(1, 2, 3, 4, "float")


def replayed(*names: str, call: int = 0) -> list[Slice]:
    return [
        Slice(name, 1.0, 10.0 * i, Kind.copy if name == "Memcpy" else Kind.kernel, call=call)
        for i, name in enumerate(names)
    ]


def launched(*names: str, stage: str = "vision") -> list[Slice]:
    return [Slice(name, 2.0, 10.0 * i, stage=stage, op=i, product=PRODUCT) for i, name in enumerate(names)]


def test_same_kernels_are_paired_in_their_order():
    pairs = align(replayed("a", "b", "a"), launched("a", "b", "a"))
    assert [pair.op for pair in pairs] == [0, 1, 2]


def test_copies_that_only_the_replay_has_are_left_out():
    names = ("Memcpy", "direct_copy_kernel", "a", "b", "Memcpy")
    assert [pair and pair.op for pair in align(replayed(*names), launched("a", "b"))] == [None, None, 0, 1, None]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "c"), "kernel 2 of 2 is c, the launched call's is b"),
        (("a", "b", "c"), "kernel 3 of 2 is c, the launched call's is nothing more"),
        (("a",), "the replay has 1 of the 2 kernels"),
        (("b", "a"), "kernel 1 of 2 is b"),
    ],
)
def test_other_kernels_are_not_paired(names, words):
    assert words in align(replayed(*names), launched("a", "b"))


def test_nothing_is_told_where_one_call_differs():
    trace = Trace("made", replayed("a", "b") + replayed("a", "c", call=1), launched("a", "b"))
    told = tell(trace)
    assert told.stages == ""
    assert "is c" in told.why
    assert told.trace == trace


def test_times_stay_those_of_the_replay():
    told = tell(Trace("made", replayed("a", "b"), launched("a", "b")))
    assert told.stages == ORDER
    assert [(one.duration_us, one.stage, one.product) for one in told.trace.slices] == [(1.0, "vision", PRODUCT)] * 2


def test_copy_in_the_midst_of_a_stage_belongs_to_it():
    names = ("Memcpy", "a", "Memcpy", "b", "Memcpy", "c", "Memcpy")
    other = launched("a", "b") + launched("c", stage="prefill")
    stages = [one.stage for one in tell(Trace("made", replayed(*names), other)).trace.slices]
    assert stages == ["", "vision", "vision", "vision", "", "prefill", ""]


def test_ranges_win_over_order():
    """Graphs of single stages: their launches stand in ranges; only the products are told by the order."""
    slices = [Slice(name, 1.0, 0.0, call=0, stage="denoise") for name in ("a", "b")]
    told = tell(Trace("made", slices, launched("a", "b")))
    assert told.stages == RANGES
    assert {(one.stage, one.product) for one in told.trace.slices} == {("denoise", PRODUCT)}
    # Where the order does not agree, the ranges still hold.
    told = tell(Trace("made", slices, launched("a", "c")))
    assert (told.stages, {one.product for one in told.trace.slices}) == (RANGES, {None})


def test_nothing_is_told_without_calls_or_stages():
    assert "does not mark calls" in tell(Trace("made", [Slice("a", 1.0, 0.0)])).why
    assert "replayed as a whole" in tell(Trace("made", replayed("a"))).why


def test_recorded_form():
    told = tell(read_trace(TRACES / "kineto_mi350_graph.json"))
    assert told.stages == ORDER
    assert [one.stage for one in told.trace.slices[:9]] == [
        "", "vision", "prefill", "prefill", "prefill", "", "denoise", "denoise", "",
    ]  # fmt: skip
