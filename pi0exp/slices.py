"""What every trace is read into: slices of GPU time, and the matrix products that some of them compute."""

from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What occupied the GPU. Profilers give copies and fills categories of their own."""

    kernel = "kernel"
    copy = "copy"
    fill = "fill"


@dataclass(frozen=True)
class Product:
    """`batch` products [m, k] x [k, n] of one dtype, as PyTorch names it without its namespace: BFloat16, float."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k

    def values(self) -> int:
        """Values of both factors and the product, each counted once."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True)
class Slice:
    """A kernel, copy or fill; where a file has only sums, `count` of them.

    start_us: microseconds from any origin; None where a file has only sums. device: as the file names it. call: index
    of the profiled call; None where the file does not tell. stage: vision, prefill, denoise, or "" where it is not
    told. op: the operation that launched it and its product; slices of one operation carry the same number.
    """

    name: str
    duration_us: float
    start_us: float | None = None
    kind: Kind = Kind.kernel
    count: int = 1
    device: str = ""
    call: int | None = None
    stage: str = ""
    op: int | None = None
    product: Product | None = None

    @property
    def end_us(self) -> float:
        assert self.start_us is not None
        return self.start_us + self.duration_us


@dataclass(frozen=True)
class Ceilings:
    """Rates that the machine reached in the run that was profiled; dtype: the profiler's name of the products' type."""

    flops_per_s: float
    bytes_per_s: float
    dtype: str


@dataclass(frozen=True)
class Trace:
    """A file of a profiler.

    format: which one. slices: of the profiled calls where the file marks them, else all; in the order in which they
    started. launched: the slices of a call whose kernels were launched one by one, to tell stages and products of calls
    that are replayed from graphs; empty where the file marks none. runtime: names of the runtime calls, such as
    cudaGraphLaunch. ceilings: where the file carries them.
    """

    format: str
    slices: list[Slice]
    launched: list[Slice] = field(default_factory=list)
    runtime: frozenset[str] = frozenset()
    ceilings: Ceilings | None = None

    @property
    def has_kernels(self) -> bool:
        return any(one.kind is Kind.kernel for one in self.slices)

    @property
    def timed(self) -> bool:
        """Whether it is known when each slice ran."""
        return all(one.start_us is not None for one in self.slices)

    @property
    def calls(self) -> int | None:
        """How many calls were profiled; None where the file does not mark them."""
        numbers = {one.call for one in self.slices}
        return None if None in numbers else len(numbers)

    def names(self) -> set[str]:
        """Of kernels, copies and runtime calls."""
        return {one.name for one in self.slices} | self.runtime
