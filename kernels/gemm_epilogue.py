"""What `gemm` and `skinny_gemm` share: the maths, the arguments, and what follows the product in the same kernel.

    z = x w^T + bias                            [M, N], or [M, 2N] if gated
    h = f(z), or gated: f(z[:, :N]) * z[:, N:]
    y = h, or residual + h, or residual + h * scale

Sums in float32, everything after them too, one rounding to the dtype of x. f is none, gelu_tanh or silu.

Shapes: M rows, K width in, N width out, C rows of the weight (N, or 2N if gated: the gate's first), G rows of scale.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pi0exp.kernels.kernel import require, wide

ACTIVATIONS = ("none", "gelu_tanh", "silu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """The maths above. x [..., K], weight [C, K], bias [C], residual [..., N], scale [G, N] -> [..., N] of x's dtype.

    Row m of the M = G * R rows takes row m // R of scale.
    """
    dtype = wide(x, weight, bias, residual, scale)
    h = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    up = None
    if gated:
        h, up = h.chunk(2, dim=-1)
    if activation == "gelu_tanh":
        h = F.gelu(h, approximate="tanh")
    elif activation == "silu":
        h = F.silu(h)
    h = h if up is None else h * up
    if scale is not None:
        h = (h.reshape(scale.shape[0], -1, h.shape[-1]) * scale.to(dtype)[:, None]).reshape(h.shape)
    return (h if residual is None else residual.to(dtype) + h).to(x.dtype)


@triton.jit
def read(at, k, left, EVEN_K: tl.constexpr):
    """A tile of a product's operand, which begins at k = 0; zeros behind the `left` values that remain of K."""
    if EVEN_K:
        return tl.load(at)
    return tl.load(at, mask=k < left, other=0.0)


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u), which does not cancel where u is far below 0; 1.59... is 2 sqrt(2 / pi).
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "silu":
        h = h * tl.sigmoid(h)
    return h


@triton.jit
def finish(
    h_MN, up_MN, m_M, n_N, y_ptr, bias_ptr, residual_ptr, scale_ptr, M, N, rows_per_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile whose rows are m_M and whose columns are n_N; `up_MN` is read only if GATED."""
    inside_MN = (m_M < M)[:, None] & (n_N < N)[None, :]
    if bias_ptr is not None:
        h_MN += tl.load(bias_ptr + n_N, mask=n_N < N, other=0.0).to(tl.float32)[None, :]
    h_MN = activate(h_MN, ACTIVATION)
    if GATED:
        if bias_ptr is not None:
            up_MN += tl.load(bias_ptr + N + n_N, mask=n_N < N, other=0.0).to(tl.float32)[None, :]
        h_MN *= up_MN
    at_MN = m_M[:, None] * N + n_N[None, :]
    if scale_ptr is not None:
        scale_at_MN = (m_M // rows_per_scale)[:, None] * N + n_N[None, :]
        h_MN *= tl.load(scale_ptr + scale_at_MN, mask=inside_MN, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h_MN += tl.load(residual_ptr + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
    tl.store(y_ptr + at_MN, h_MN.to(y_ptr.dtype.element_ty), mask=inside_MN)


# ---- arguments


def arch_of(device: torch.device) -> str:
    """ "sm_90" or "gfx942"; "cpu" under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None,
    activation: str, gated: bool,
) -> tuple[Tensor, int, int, int]:  # fmt: skip
    """x as [M, K] with contiguous rows, then M, N and rows per row of scale. Raises ValueError with what is wrong."""
    C, K = weight.shape
    N = C // 2 if gated else C
    x_MK = x.reshape(-1, x.shape[-1])
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    M = x_MK.shape[0]
    require(x.shape[-1] == K, f"x is {list(x.shape)}, weight {list(weight.shape)}: the last axes differ")
    require(not gated or C % 2 == 0, f"a gated weight has an even number of rows, not {C}")
    require(
        x.dtype in DTYPES and weight.dtype is x.dtype,
        f"x is {x.dtype}, weight {weight.dtype}: wanted bfloat16, float16 or float32 for both",
    )
    require(activation in ACTIVATIONS, f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    require(bias is None or bias.shape == (C,), f"bias is not [{C}]")
    require(residual is None or residual.shape == (*x.shape[:-1], N), f"residual is not {[*x.shape[:-1], N]}")
    require(scale is None or residual is not None, "scale without residual")
    require(
        scale is None or (scale.dim() == 2 and scale.shape[1] == N and M % scale.shape[0] == 0),
        f"scale is not [G, {N}] with G a divisor of {M}",
    )
    given = (t for t in (weight, bias, residual, scale) if t is not None)
    require(all(t.is_contiguous() for t in given), "weight, bias, residual and scale must be contiguous")
    require(max(M * x_MK.stride(0), C * K, M * N) < 2**31, "an argument has 2^31 elements or more")
    return x_MK, M, N, 1 if scale is None else M // scale.shape[0]
