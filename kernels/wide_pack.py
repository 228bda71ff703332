"""The weights of a denoising step in the order in which the programs of `stream_wide` take them: a row of chunks each.

A chunk is BOXES boxes of BOX rows and columns, as the matrix instruction reads them. A program has a tile of w_qkv with
the whole of K, halves of its pairs in turns, where there is one for it; BOX columns of w_out, and one of PARTS parts of
K; a tile of w_gate_up, gate and up in turns; and of w_down as of w_out.

Shapes: L layers, P programs, C rows of w_qkv, D width of the residual stream, K = N H width of the heads, F hidden
width.
"""

from torch import Tensor

from pi0exp.kernels.kernel import require
from pi0exp.kernels.ring_pack import in_rows
from pi0exp.kernels.stream_pack import COLUMNS, HIDDEN_COLUMNS, PAIRS, Weights, unordered
from pi0exp.kernels.wide import BOX, BOXES

PARTS: int = BOX.value // COLUMNS.value
"""Of K in the products back to the residual stream, so that there is a program for each part of BOX columns."""
STEP: int = BOX.value * BOXES.value
"""Of K that a chunk of x has."""


def packed_wide(weights: Weights, H: int) -> Tensor:
    """The chunks of all programs, [P, L, CHUNKS, values], each program's in the order in which it takes them.

    What programs without a tile of w_qkv lack stands, as zeros, behind all of theirs.

    Raises ValueError where the widths do not fit, see `misfit`.
    """
    (L, C, D), K, F = weights.qkv_LCD.shape, weights.out_LDK.shape[2], weights.down_LDF.shape[2]
    require(not (why := misfit(D, H, F, K // H, C // H)), why)
    pairs, hidden, P = PAIRS.value, HIDDEN_COLUMNS.value, D // COLUMNS.value
    qkv = weights.qkv_LCD.view(L, C // H, 2, H // 2 // pairs, pairs, D).permute(0, 1, 3, 4, 2, 5)
    gate_up = weights.gate_up_LCD.view(L, 2, P, hidden, D).permute(0, 2, 3, 1, 4)
    return in_rows(
        [
            _boxes(qkv.reshape(L, -1, 2 * pairs, D)),
            _boxes(_parts(weights.out_LDK)),
            _boxes(gate_up.reshape(L, P, 2 * hidden, D)),
            _boxes(_parts(weights.down_LDF)),
        ]
    )


def _parts(weight_LDK: Tensor) -> Tensor:
    """[L, programs, BOX, a part of K]."""
    L, D, K = weight_LDK.shape
    return weight_LDK.view(L, D // BOX.value, BOX.value, PARTS, K // PARTS).transpose(2, 3).flatten(1, 2)


def _boxes(tiles_LPRK: Tensor) -> Tensor:
    """[L, programs, chunks, values]: BOX columns of K behind one another, and a box for as many as have BOX rows."""
    L, P, R, K = tiles_LPRK.shape
    cut = tiles_LPRK.reshape(L, P, R, K // BOX.value, BOX.value).transpose(2, 3)
    return cut.reshape(L, P, -1, BOXES.value * BOX.value * BOX.value)


def query_heads(D: int, chunks: int, H: int) -> int:
    """Of a model whose programs have so many chunks of a layer: those of w_out tell."""
    F = HIDDEN_COLUMNS.value * D // COLUMNS.value
    of_out = chunks - D // (2 * STEP) - D // STEP - F // (PARTS * STEP)
    return int(of_out * PARTS * STEP // H)


def unpacked_wide(weights_PLCV: Tensor, D: int, H: int, heads: int) -> Weights:
    """The weights as `packed_wide` was given them; heads: of keys and values together."""
    P, L, chunks, _ = weights_PLCV.shape
    F, K = HIDDEN_COLUMNS.value * P, query_heads(D, chunks, H) * H
    sizes = [(L, K + heads * H, D), (L, D, K), (L, 2 * F, D), (L, D, F)]
    return unordered(weights_PLCV, sizes, lambda plain: packed_wide(plain, H))


def misfit(D: int, H: int, F: int, N: int, heads: int) -> str:
    """Why the kernel cannot take a model of these widths, with so many heads of q, k and v; "" if it can."""
    odd = [f"{name} = {size}" for name, size, unit in (
        ("D", D, 2 * STEP), ("N H", N * H, PARTS * STEP), ("F", F, PARTS * STEP)
    ) if size % unit]  # fmt: skip
    if odd:
        return f"{' and '.join(odd)}: no multiple of what the chunks of a program's part hold"
    if D // COLUMNS.value != F // HIDDEN_COLUMNS.value:
        return f"F = {F} is not {HIDDEN_COLUMNS.value // COLUMNS.value} D: programs would have unlike tiles"
    if H != STEP:
        return f"a head dim of {H}: keys and values are multiplied in boxes that are for {STEP}"
    if heads * H // (2 * PAIRS.value) > D // COLUMNS.value:
        return f"{heads} heads of {H} have more tiles than there are programs"
    return ""
