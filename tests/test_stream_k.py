"""The cut of stream-K: every step of every tile by one program, and every part of a tile where it is looked for.

The kernel is compiled in `test_kernels_aot`, interpreted in `test_gluon`, and run on a GPU: `test_kernels`.
"""

from itertools import pairwise

import pytest
import torch

from pi0exp.kernels.stream_k_gemm import KERNELS, cut, owner, stream_k_gemm, turn

cut, owner, turn = cut.fn, owner.fn, turn.fn  # as Python has them
SIZES = [(54, 68, 132), (54, 18, 132), (162, 18, 132), (204, 18, 132), (112, 256, 132)]
SIZES += [(1, 64, 132), (3, 3, 9), (5, 1, 5)]
"""Tiles, steps of each, programs: those of the kernel's cases on 132 multiprocessors, and small ones."""
SIZES += [(tiles, steps, programs) for tiles in (1, 2, 7) for steps in (1, 2, 5) for programs in (1, 3, 4, 7)]
SIZES = [(tiles, steps, programs) for tiles, steps, programs in SIZES if programs <= tiles * steps]


def taken(me: int, tiles: int, steps: int, programs: int) -> list[tuple[int, int, int]]:
    """(tile, begin, end) of a program's segments, in the order of the kernel's loop."""
    first, last = cut(me, tiles * steps, programs)
    tile, i, found = (last - 1) // steps, 0, []
    while i < last - first:
        begin, end = max(first, tile * steps), min(last, (tile + 1) * steps)
        found.append((tile, begin, end))
        i, tile = i + end - begin, tile - 1
    return found


@pytest.mark.parametrize(("tiles", "steps", "programs"), SIZES)
def test_each_step_is_taken_once_and_fetched_in_its_turn(tiles: int, steps: int, programs: int):
    total, seen = tiles * steps, []
    shares = []
    for me in range(programs):
        first, last = cut(me, total, programs)
        multiplied = [step for _, begin, end in taken(me, tiles, steps, programs) for step in range(begin, end)]
        assert [turn(i, first, last, steps) for i in range(last - first)] == multiplied
        assert all(owner(step, total, programs) == me for step in multiplied)
        seen += multiplied
        shares.append(last - first)
    assert sorted(seen) == list(range(total))
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("tiles", "steps", "programs"), SIZES)
def test_what_is_left_is_what_is_looked_for(tiles: int, steps: int, programs: int):
    """A program leaves at most one part, its first segment; who ends a tile adds the parts of all that it lacks."""
    left: dict[int, tuple[int, int, int]] = {}
    for me in range(programs):
        segments = taken(me, tiles, steps, programs)
        unfinished = [one for one in segments if one[2] < (one[0] + 1) * steps]
        assert unfinished == segments[: len(unfinished)]
        assert len(unfinished) <= 1
        if unfinished:
            left[me] = unfinished[0]
    ended = {}
    for me in range(programs):
        for tile, begin, end in taken(me, tiles, steps, programs):
            if end == (tile + 1) * steps:
                waited = range(owner(tile * steps, tiles * steps, programs), me) if begin > tile * steps else range(0)
                ended[tile] = [left.pop(program) for program in waited] + [(tile, begin, end)]
    assert not left  # every flag is taken down again
    assert sorted(ended) == list(range(tiles))
    for tile, parts in ended.items():
        assert {part[0] for part in parts} == {tile}
        assert parts[0][1] == tile * steps
        assert all(a[2] == b[1] for a, b in pairwise(parts))  # in the order of K


def test_nobody_waits_in_a_circle():
    """Who waits does so in its last segment, for first segments: these wait for nobody."""
    for tiles, steps, programs in SIZES:
        for me in range(programs):
            segments = taken(me, tiles, steps, programs)
            waiting = [i for i, (tile, begin, end) in enumerate(segments) if begin > tile * steps and end % steps == 0]
            assert waiting in ([], [len(segments) - 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none")
@pytest.mark.gpu
def test_equal_inputs_give_equal_bits():
    device = torch.device("cuda", 0)
    for case in KERNELS[0].cases:
        given = case.make(torch.Generator(device).manual_seed(0), device)
        first = stream_k_gemm(*given)
        assert all(torch.equal(stream_k_gemm(*given), first) for _ in range(20))
        assert not given[3].any()


@pytest.mark.parametrize(
    ("change", "why"),
    [({6: "silu"}, "activation is 'silu'"), ({0: torch.zeros(4, 64)}, "float32")],
)
def test_what_does_not_fit_is_refused(change: dict[int, object], why: str):
    given: list[object] = [
        torch.zeros(4, 64).bfloat16(), torch.zeros(8, 64).bfloat16(), torch.zeros(1), torch.zeros(1), None, None, "none"
    ]  # fmt: skip
    for position, value in change.items():
        given[position] = value
    if 0 in change:
        given[1] = torch.zeros(8, 64)
    with pytest.raises(ValueError, match=why):
        stream_k_gemm(*given)
