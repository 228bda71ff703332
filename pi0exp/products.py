"""How well matrix products use the GPU: one row a shape, against the ceilings measured in the same run."""

from collections import defaultdict
from dataclasses import dataclass

from pi0exp.kernel_table import category
from pi0exp.slices import Ceilings, Product, Slice

_BYTES = {"BFloat16": 2, "Half": 2, "float": 4, "double": 8, "Float8_e4m3fn": 1, "Float8_e4m3fnuz": 1, "Float8_e5m2": 1}
"""Bytes of a value, by the profiler's name of the type."""


@dataclass(frozen=True)
class ProductRow:
    """All products of one shape.

    count, ms: of one call. tflop_per_s: over their kernels' time, those that add up the parts of a split product
    included. of_ceiling: share of the measured matrix rate; of_roofline: share of what the slower of arithmetic and
    memory allows, every value moved once (more than 1 where a factor was in the cache). Both None without a ceiling
    of that dtype, all three where the kernels have no time of their own.

    The time is the kernels' own (pi0exp.timeline). Over durations, a product that was launched ahead would look slow
    for having waited, and the FLOP of all over the time of all would be no rate that the GPU ran at. Over own times it
    is: arithmetic begins only when the kernel in front has ended, and no instant counts twice. The price: what a kernel
    reads ahead is not in its time, so the rate of one shape may be too high, its of_roofline even above 1, and that of
    the shape in front, which shares the memory with it, too low; over a chain both cancel. Of products that truly share
    the GPU, on streams of their own, only the rate of all of them together means something.
    """

    product: Product
    count: float
    ms: float
    tflop_per_s: float | None
    of_ceiling: float | None
    of_roofline: float | None


def product_rows(slices: list[Slice], calls: int, ceilings: Ceilings | None) -> list[ProductRow]:
    """The shapes that are known, the one that takes most time first. slices: without overlaps."""
    microseconds: dict[Product, float] = defaultdict(float)
    operations: dict[Product, set[tuple[int | None, int | None]]] = defaultdict(set)
    for one in slices:
        if one.product is not None and category(one) == "gemm":
            microseconds[one.product] += one.duration_us
            operations[one.product].add((one.call, one.op))
    rows = []
    for product, us in microseconds.items():
        count = len(operations[product])
        seconds = us * 1e-6 / count
        rate = product.flops / seconds if seconds else None
        of_ceiling = of_roofline = None
        if rate and ceilings is not None and ceilings.dtype == product.dtype and product.dtype in _BYTES:
            of_ceiling = rate / ceilings.flops_per_s
            moved = product.values() * _BYTES[product.dtype] / ceilings.bytes_per_s
            of_roofline = max(product.flops / ceilings.flops_per_s, moved) / seconds
        tflop_per_s = None if rate is None else rate / 1e12
        rows.append(ProductRow(product, count / calls, us * 1e-3 / calls, tflop_per_s, of_ceiling, of_roofline))
    return sorted(rows, key=lambda row: -row.ms)
