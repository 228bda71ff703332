"""Which matrix products a policy computes, in which order: asked of the model itself, which runs without numbers.

Products of `Linear` only: those of attention are timed with attention, and the patches' convolution is none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pi0exp.fusion.fusion import Fusion
from pi0exp.model.layers import Linear, MatmulFn
from pi0exp.option import STAGES
from pi0exp.policy_subject import PolicySubject


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, out] of a stage, in the dtype of the weight."""

    stage: str
    rows: int
    out: int
    inner: int
    bias: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """prefill/788x32768x2048: rows, output and input width; _bias and _fp32 where it has them."""
        marks = ("_bias" if self.bias else "") + ("_fp32" if self.dtype is torch.float32 else "")
        return f"{self.stage}/{self.rows}x{self.out}x{self.inner}{marks}"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.out * self.inner

    @property
    def bytes_moved(self) -> float:
        """Activations and weight read once, results written once."""
        values = self.rows * self.inner + self.out * self.inner + self.rows * self.out + self.bias * self.out
        return float(values * self.dtype.itemsize)


Call = tuple[Product, int]
"""A product, and which of the weights of this shape it multiplies with: 0, 1 and so on in the order of first use."""


_recorded: dict[str, list[Call]] = {}
"""What decides the products of a policy, as text -> they. Asking the model takes seconds, and points that differ in
`gemm` alone have the same."""


def recorded(whole: PolicySubject) -> list[Call]:
    """Every product of one call, in order, not to be changed. Image masking, merged matrices and rewrites of the stack
    are applied.
    """
    stack = whole.stack
    key = repr((whole.dimensions, whole.workload, stack.image_masking, stack.fusion, stack.precision))
    if key not in _recorded:
        _recorded[key] = _asked(whole)
    return _recorded[key]


def _asked(whole: PolicySubject) -> list[Call]:
    policy = whole.without_numbers()
    fusion = whole.stack.fusion
    assert isinstance(fusion, Fusion)
    with torch.no_grad():
        whole.stack.image_masking.apply(policy)
        # Kernels between the matrices change no product, and cannot run without numbers.
        replace(fusion, norms=False, activation=False, rope=False).apply(policy)
    calls: list[Call] = []
    weights: dict[Product, dict[Linear, int]] = {}

    def take(stage: str, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out, inner = weight.shape
        product = Product(stage, x.numel() // inner, out, inner, bias is not None, weight.dtype)
        known = weights.setdefault(product, {})
        calls.append((product, known.setdefault(linear, len(known))))
        return x.new_empty((*x.shape[:-1], out))

    def slot(stage: str) -> Callable[[Linear], MatmulFn]:
        return lambda linear: partial(take, stage, linear)

    for stage in STAGES:
        policy.fill_each(Linear, "matmul", slot(stage), (stage,), "written down")
    item = whole.inputs(1).items[0]
    noise = torch.from_numpy(item.noise).to("meta")
    policy.sample_actions(item.observation(whole.dimensions, "meta"), noise)
    return calls
