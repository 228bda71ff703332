"""The ring's weights: each program's chunks hold what its products read, in the order in which it takes them.

The kernel itself is compiled in `test_kernels_aot`, interpreted in `test_gluon`, and run on a GPU: `test_kernels`,
`test_blocks_gpu`.
"""

import pytest
import torch
from step_weights import C, D, F, H, L, N, P, random_weights
from torch import Tensor

from pi0exp.errors import UnsupportedError
from pi0exp.fusion.persistent import through_a_ring
from pi0exp.kernels.ring_pack import BK_D, BK_F, BK_OUT, misfit, packed_ring, query_heads, scheduled, unpacked_ring
from pi0exp.kernels.stream_pack import Weights

QKV, OUT, GATE_UP, DOWN = D // (8 * BK_D), N * H // (8 * BK_OUT), 2 * D // (8 * BK_D), F // (8 * BK_F)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def ring(weights: Weights) -> Tensor:
    return packed_ring(weights, H)


def tile(chunks_CV: Tensor, rows: int, width: int) -> Tensor:
    """Chunks, one a step of K, as [rows, K]: k = 32 a + 16 d + 8 e + 2 c + f of a warp's part."""
    cut = chunks_CV.view(-1, rows // 8, width // 32, 8, 8, 4, 2, 2, 2)  # step, rows, a, warp, row, c, d, e, f
    return cut.permute(1, 4, 0, 3, 2, 6, 7, 5, 8).reshape(rows, -1)


@pytest.mark.parametrize("program", [0, 5, 79, 80, 127])
def test_a_program_has_the_rows_of_its_tiles(program: int, weights: Weights, ring: Tensor):
    own = QKV if program < C // 32 else 0
    count = own + OUT + GATE_UP + DOWN
    _, second, behind = ring[program].flatten(0, 1).split([count, count, L * (ring.shape[2] - count)])
    assert not behind.any()
    chunks = second.split([own, OUT, GATE_UP, DOWN])
    if program < C // 32:
        head, pair = program // 8, program % 8 * 16
        pairs = weights.qkv_LCD[1].view(C // H, 2, H // 2, D)[head, :, pair : pair + 16].flatten(0, 1)
        assert torch.equal(tile(chunks[0], 32, BK_D), pairs)
    columns = slice(8 * program, 8 * program + 8)
    assert torch.equal(tile(chunks[1], 8, BK_OUT), weights.out_LDK[1, columns])
    assert torch.equal(tile(chunks[3], 8, BK_F), weights.down_LDF[1, columns])
    gate, up = weights.gate_up_LCD[1].view(2, P, 32, D)[:, program]
    assert torch.equal(tile(chunks[2][0::2], 32, BK_D), gate)
    assert torch.equal(tile(chunks[2][1::2], 32, BK_D), up)


def test_the_weights_come_back(weights: Weights, ring: Tensor):
    assert query_heads(D, P, ring.shape[2], H) == N
    assert all(map(torch.equal, unpacked_ring(ring, D, H, 2), weights))


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((D, H, F, N, N + 2), ""),
        ((1000, H, F, N, N + 2), "D = 1000: no multiple of what 8 warps take at a time"),
        ((D, H, 2 * F, N, N + 2), "F = 8192 is not 4 D: programs would have unlike tiles"),
        ((D, H, F, N, 20), "20 heads of 256 have more tiles than there are programs"),
        ((D, 128, F, 2 * N, 2 * N + 2), "a head dim of 128: keys and values are read in an order that is for 256"),
        (
            (2 * D, H, 2 * F, N, N + 2),
            "phases that take [4, 0, 0, 1, 8, 4] chunks: not what the ring's weights are asked for",
        ),
    ],
)
def test_widths_that_do_not_fit(sizes: tuple[int, int, int, int, int], why: str):
    assert misfit(*sizes) == why


@pytest.mark.parametrize(
    ("takes", "fits"),
    [
        ([2, 0, 0, 1, 4, 2], True),
        ([2, 0, 0, 1, 4, 1], False),  # more are asked for than are taken
        ([2, 0, 0, 2, 3, 2], True),
        ([5, 0, 0, 1, 1, 2], False),  # taken before it was asked for
        ([2, 0, 0, 0, 5, 2], False),  # no room
    ],
)
def test_a_schedule_neither_waits_for_ever_nor_overruns(takes: list[int], fits: bool):
    assert scheduled(takes) is fits


def test_a_model_that_does_not_fit_is_refused():
    small = Weights(*(torch.zeros(size) for size in ((1, 80, 64), (1, 64, 64), (1, 256, 64), (1, 64, 128))))
    with pytest.raises(UnsupportedError, match=r"^ring: D = 64 and N H = 64 and F = 128: no multiple"):
        through_a_ring(small, 8)
