"""Each shape of the policy's products timed apart, and what the times come to in a call of the policy."""

from collections.abc import Callable, Sequence

from torch import Tensor

from pi0exp.config import MeasureConfig
from pi0exp.model.layers import Linear
from pi0exp.roofline import Ceilings
from pi0exp.subjects.shapes import Product


def multiply(linear: Linear, x_RK: Tensor) -> Tensor:
    made: Tensor = linear(x_RK)
    return made


def rounds(settings: MeasureConfig) -> int:
    """Samples of each case: a tenth of those of the whole call, 7 at least."""
    return max(7, settings.samples // 10)


def repeats(product: Product, sets: int, ceilings: Ceilings | None, replay_us: float) -> int:
    """Calls for one sample: a multiple of the sets. Without ceilings each set once."""
    from pi0exp.kernels.bench import call_count

    return sets if ceilings is None else call_count(product, sets, ceilings, replay_us)


def rates(product: Product, us: float, ceilings: Ceilings | None) -> dict[str, float]:
    """Of one shape. case_share: of what memory and arithmetic allow at the measured ceilings."""
    from pi0exp.kernels.bench import least_us

    made = {f"case_us/{product.name}": us, f"case_tflop_per_s/{product.name}": product.flops / us / 1e6}
    if ceilings is not None:
        made[f"case_share/{product.name}"] = least_us(product, ceilings) / us
    return made


def totals(calls: dict[Product, int], times: dict[Product, float], ceilings: Ceilings | None) -> dict[str, float]:
    """Of all products of a policy call. cases/ms: the sum of their times apart. cases/tflop_per_s: all FLOP over it.

    cases/share: of what the measured ceilings allow. cases/matrix_share: the same over those products alone that are
    bound by arithmetic, hence their share of the matrix ceiling; cases/matrix_ms: their time. Without such
    products both are missing.
    """
    from pi0exp.kernels.bench import least_us

    def total(value: Callable[[Product], float], of: Sequence[Product]) -> float:
        return sum(calls[product] * value(product) for product in of)

    every = list(calls)
    us, flops = total(times.__getitem__, every), total(lambda product: product.flops, every)
    made = {"cases/ms": us / 1e3, "cases/tflop_per_s": flops / us / 1e6}
    if ceilings is None:
        return made
    bound = [p for p in every if p.flops / ceilings.flops_per_s >= p.bytes_moved / ceilings.bytes_per_s]
    made["cases/share"] = total(lambda product: least_us(product, ceilings), every) / us
    if bound:
        us = total(times.__getitem__, bound)
        made["cases/matrix_ms"] = us / 1e3
        made["cases/matrix_share"] = total(lambda product: least_us(product, ceilings), bound) / us
    return made
