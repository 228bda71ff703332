"""The operands of all matrix products of a policy: as many weights as it has, activations, and the order of calls."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pi0exp import verify
from pi0exp.model.layers import Linear
from pi0exp.model.precision import Precision
from pi0exp.option import STAGES, Numerics
from pi0exp.subject import Verdict
from pi0exp.subjects.part import Given
from pi0exp.subjects.shapes import Call, Product

MOST_SETS = 256
"""Weights of one shape at most: those of tiny ones would be thousands. They are a thousandth of the time."""
INFINITY_CACHE = 256 * 2**20
"""Of AMD's MI300 and MI350, behind the L2 that PyTorch tells of (AMD CDNA 3 and CDNA 4 white papers)."""


class Products(nn.Module):
    """The weights of every shape, the activations that they multiply, and the calls of one policy call."""

    def __init__(self, calls: Sequence[Call], sets: dict[Product, int], precision: Precision, device: torch.device):
        super().__init__()
        self.precision = precision
        self.calls = {stage: [call for call in calls if call[0].stage == stage] for stage in STAGES}
        generator = torch.Generator(device).manual_seed(0)
        self.linears: dict[Product, list[Linear]] = {}
        self.inputs: dict[Product, list[Tensor]] = {}
        for product, count in sets.items():
            drawn = [drawn_product(product, generator, device) for _ in range(count)]
            self.linears[product] = [linear for linear, _ in drawn]
            self.inputs[product] = [x_RK for _, x_RK in drawn]
        self.stages = nn.ModuleDict({stage: nn.ModuleList(self._of(stage)) for stage in STAGES})

    def _of(self, stage: str) -> list[Linear]:
        return [one for product, linears in self.linears.items() if product.stage == stage for one in linears]

    def vision(self) -> list[Tensor]:
        return self._run("vision")

    def prefill(self) -> list[Tensor]:
        return self._run("prefill")

    def denoise(self) -> list[Tensor]:
        return self._run("denoise")

    def _run(self, stage: str) -> list[Tensor]:
        """What comes of the last product, in a list; of a stage without any, nothing."""
        made: list[Tensor] = []
        for product, which in self.calls[stage]:
            made = [self.linears[product][which](self.inputs[product][0])]
        return made

    def forward(self, given: Given, x: Tensor) -> Tensor:
        """All products; what comes of the last."""
        return [*self.vision(), *self.prefill(), *self.denoise()][-1]

    def each(self) -> list[Tensor]:
        """One result of each shape."""
        return [linears[0](self.inputs[product][0]) for product, linears in self.linears.items()]


def drawn_product(product: Product, generator: torch.Generator, device: torch.device) -> tuple[Linear, Tensor]:
    """A matrix, and [rows, inner] for it; results are of order one."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    with torch.device("meta"):
        linear = Linear(product.inner, product.out, bias=product.bias)
    weight = normal(product.out, product.inner) * product.inner**-0.5
    linear.weight = nn.Parameter(weight.to(product.dtype), requires_grad=False)
    if product.bias:
        linear.bias = nn.Parameter(normal(product.out).to(product.dtype), requires_grad=False)
    return linear, normal(product.rows, product.inner).to(product.dtype)


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before the memory; 0 for a CPU, of which nothing is claimed."""
    from pi0exp.kernels.bench import l2_bytes

    return max(l2_bytes(device), INFINITY_CACHE if torch.version.hip else 0)


def set_count(product: Product, weights: int, cache: int) -> int:
    """How many weights of a shape: as many as the policy has, and more where they would fit the cache."""
    return max(weights, min(MOST_SETS, math.floor(3 * cache / product.bytes_moved) + 1))


def true_result(model: Products, product: Product) -> Tensor:
    """Of the first weight, in float64."""
    linear, x_RK = model.linears[product][0], model.inputs[product][0].double()
    bias = None if linear.bias is None else linear.bias.double()
    return torch.nn.functional.linear(x_RK, linear.weight.double(), bias)


def judged(
    model: Products,
    found: Sequence[Tensor],
    plain: Sequence[Tensor],
    truth: Sequence[Tensor],
    numerics: Numerics,
    bound: float | None,
    precision: str,
) -> Verdict:
    """One result of each shape against float64.

    EXACT: equal to the plain product. REORDERED: the rule of the kernels, twice the plain product's error and one
    rounding. APPROXIMATE: finite, and within the bound if there is one.
    """
    from pi0exp.kernels.kernel import compare

    wrong, errors, own = [], [], []
    for product, ours, eager, exact in zip(model.linears, found, plain, truth, strict=True):
        made = compare(product.name, ours, eager, exact, product.inner)
        errors.append(made.l2)
        own.append(made.eager_l2)
        why = made.wrong
        if numerics is Numerics.EXACT:
            why = verify.unequal([eager], [ours], "results")
        elif numerics is Numerics.APPROXIMATE:
            why = "" if made.l2 <= (math.inf if bound is None else bound) else f"L2 error {made.l2:.3g}, bound {bound}"
        wrong += [f"{product.name}: {why}"] if why else []
    metrics = {
        "error/rel_l2": verify.geometric_mean(errors),
        f"error/rel_l2_plain_{precision}": verify.geometric_mean(own),
    }
    return Verdict(wrong, metrics)
