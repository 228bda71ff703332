"""The weights of the kernel for many rows: each program's chunks hold, box by box, what its products read.

And for which steps it is taken.

The kernel itself is compiled in `test_kernels_aot`, interpreted in `test_gluon`, and run on a GPU: `test_kernels`,
`test_blocks_gpu`.
"""

import pytest
import torch
from step_weights import C, D, F, H, L, N, P, random_weights
from torch import Tensor

from pi0exp.errors import UnsupportedError
from pi0exp.fusion import persistent
from pi0exp.fusion.persistent import form_for, through_a_wide_ring
from pi0exp.kernels.stream_pack import Weights
from pi0exp.kernels.wide_pack import misfit, packed_wide, query_heads, unpacked_wide

QKV, OUT, GATE_UP, DOWN = 2, 1, 4, 2


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def wide(weights: Weights) -> Tensor:
    return packed_wide(weights, H)


def tile(chunks_CV: Tensor, rows: int) -> Tensor:
    """Chunks of boxes of 64 columns of K as [rows, K]."""
    return chunks_CV.view(-1, rows, 64).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("program", [0, 13, 79, 80, 127])
def test_a_program_has_the_rows_of_its_tiles(program: int, weights: Weights, wide: Tensor):
    own = QKV if program < C // 32 else 0
    count = own + OUT + GATE_UP + DOWN
    _, second, behind = wide[program].flatten(0, 1).split([count, count, L * (wide.shape[2] - count)])
    assert not behind.any()
    qkv, out, gate_up, down = second.split([own, OUT, GATE_UP, DOWN])
    if own:
        head, pair = program // 8, program % 8 * 16
        low, high = weights.qkv_LCD[1].view(C // H, 2, H // 2, D)[head, :, pair : pair + 16]
        assert torch.equal(tile(qkv, 32)[0::2], low)
        assert torch.equal(tile(qkv, 32)[1::2], high)
    columns, part = slice(program // 8 * 64, program // 8 * 64 + 64), program % 8
    assert torch.equal(tile(out, 64), weights.out_LDK[1, columns].chunk(8, dim=1)[part])
    assert torch.equal(tile(down, 64), weights.down_LDF[1, columns].chunk(8, dim=1)[part])
    gate, up = weights.gate_up_LCD[1].view(2, P, 32, D)[:, program]
    assert torch.equal(tile(gate_up, 64)[0::2], gate)
    assert torch.equal(tile(gate_up, 64)[1::2], up)


def test_the_weights_come_back(weights: Weights, wide: Tensor):
    assert query_heads(D, wide.shape[2], H) == N
    assert all(map(torch.equal, unpacked_wide(wide, D, H, 2), weights))


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((D, H, F, N, N + 2), ""),
        ((768, H, 3072, N, N + 2), "D = 768 and F = 3072: no multiple of what the chunks of a program's part hold"),
        ((D, H, 2 * F, N, N + 2), "F = 8192 is not 4 D: programs would have unlike tiles"),
        ((D, H, F, N, 20), "20 heads of 256 have more tiles than there are programs"),
        ((D, 128, F, 2 * N, 2 * N + 2), "a head dim of 128: keys and values are multiplied in boxes that are for 256"),
    ],
)
def test_widths_that_do_not_fit(sizes: tuple[int, int, int, int, int], why: str):
    assert misfit(*sizes) == why


def test_another_width_is_unsupported():
    small = Weights(*(torch.zeros(1, *size) for size in ((160, 64), (64, 128), (256, 64), (64, 128))))
    with pytest.raises(UnsupportedError, match="wide: D = 64 and N H = 128 and F = 128: no multiple"):
        through_a_wide_ring(small, 16)


def test_each_number_of_rows_has_its_kernel():
    def made(rows: int, ring: bool, wide: bool) -> object:
        form = form_for(rows, ring, wide)
        return None if form is None else (form.rows, form.make)

    assert made(16, ring=False, wide=False) == (16, persistent.in_registers)
    assert made(11, ring=True, wide=True) == (16, persistent.through_a_ring)
    assert made(17, ring=True, wide=True) == made(64, ring=True, wide=True) == (64, persistent.through_a_wide_ring)
    assert made(17, ring=True, wide=False) is made(65, ring=True, wide=True) is None
