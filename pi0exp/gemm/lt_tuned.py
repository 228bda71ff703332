"""NVIDIA's cuBLASLt, for each product with the algorithm that was the fastest when tried.

PyTorch asks cuBLASLt's heuristics for an algorithm and takes the first; of those that they also suggest one may be much
faster (vision's second MLP product on an H100: 16.6 us instead of 23.9; `tables/cublaslt_sm_90.json`). It is what
`gemm=tunable` would be if PyTorch's TunableOp had candidates for CUDA.

A table says what to take for a shape; what it lacks is tuned in the first call of the shape, outside of any capture,
about half a second each, and kept as an artifact, `cublaslt.json`, which can be given as `table`.

To a compiler a product is an op that it does not look into, so that `compile_mode` fuses what stands between products
that are chosen here.

Sizes: x [M, K], weight [N, K].
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pi0exp import cublaslt
from pi0exp.compile_mode.option import CompileOption
from pi0exp.cublaslt import ALIGNED, WORKSPACE, Problem, Product
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.gemm.blas import PRODUCTS
from pi0exp.gemm.lt_search import Found, Shape, fastest, layers_in_turns
from pi0exp.gemm.lt_table import LtTable, read_table, shipped
from pi0exp.machine import this_machine
from pi0exp.model.layers import Linear, MatmulFn
from pi0exp.option import STAGES, Numerics, Requires, StagedOption
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption

if TYPE_CHECKING:
    from pi0exp.config import Stack

ARTIFACT = "cublaslt.json"


@dataclass(frozen=True)
class LtTuned(StagedOption):
    """Products of the bf16 weights; those of float32 stay with BLAS, and GELU in a product's epilogue with PyTorch.

    table: a table that an earlier run kept; it must be of this architecture and version of cuBLASLt. None is the
        shipped one, where there is one that fits.
    strict: a shape that the table lacks is an error instead of being tuned here.

    Numerics: other kernels, which add in another order. Proof: the names of cuBLAS's kernels, which are the same
    whoever chose; the result lists what was taken, and counts: cublaslt/products_<stage> of different shapes, of which
    cublaslt/not_first_<stage> have another algorithm than the heuristics' first and cublaslt/tuned_here_<stage> were in
    no table; cublaslt/tune_s, seconds, part of the first call.
    """

    requires = Requires(vendors=("nvidia",))
    numerics = Numerics.REORDERED

    table: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.table is not None:
            try:
                read_table(Path(self.table))
            except UserError as error:
                raise ValueError(str(error).removeprefix("gemm.")) from error

    def proof(self) -> str:
        return PRODUCTS["nvidia"]

    def files(self) -> list[str]:
        return [] if self.table is None else [self.table]

    def clashes(self, stack: "Stack") -> list[str]:
        reasons = []
        for stage in STAGES:
            mode = stack.compile_mode.at(stage)
            if stack.gemm.at(stage) is not self or not isinstance(mode, CompileOption):
                continue
            if mode.settings().get("max_autotune"):
                reasons.append(
                    f"compile_mode.{stage} would choose the products' kernels itself, but does not see these:"
                    " no max_autotune"
                )
            elif mode.captures:
                # Its first calls have memory of their own, in which the graphs that time algorithms have no place.
                reasons.append(f"compile_mode.{stage} captures from the first call on, in which products are tuned")
        if isinstance(stack.precision, PrecisionOption) and stack.precision.model.activations != torch.bfloat16:
            reasons.append("its products are of bf16; this precision has none")
        return reasons

    def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
        if ARTIFACT not in policy.shared:  # one table of all stages, whether they are one option's or have one each
            used = policy.shared[ARTIFACT] = Used(policy.device)
            policy.attach_with(lambda: {ARTIFACT: used.text()})
        known = Known(self, policy.shared[ARTIFACT], policy.note)
        lines = policy.applied.setdefault("gemm", [])
        for stage in stages:
            products = Products(stage, known, policy.instances(Linear, stage), lines.append)

            def matmul_of(linear: Linear, products: "Products" = products) -> MatmulFn | None:
                return products.matmul if linear.weight.dtype == torch.bfloat16 else None

            policy.fill_each(Linear, "matmul", matmul_of, (stage,), "cuBLASLt, the fastest algorithm")
            if left := sum(one.weight.dtype != torch.bfloat16 for one in policy.instances(Linear, stage)):
                policy.note(f"{stage}: {left} Linear that are not of bf16 stay with BLAS")
            policy.count_with(products.counters)


_here: dict[tuple[int | None, Shape], Found] = {}
"""What was tuned in this process, by device: all of its policies take the same algorithms."""
seconds = {"tuning": 0.0}


class Used:
    """What the stages of a policy share: the workspace, and what they used. Raises UserError without a cuBLASLt."""

    def __init__(self, device: torch.device):
        self.device, self.machine, self.version = device, this_machine(), cublaslt.version()
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self.rows: dict[Shape, Found] = {}

    def text(self) -> str:
        """A table of the shapes that were used."""
        return LtTable(self.machine.arch, self.version, {"gpu": self.machine.gpu}, self.rows).text()


class Known:
    """What a table and this process know of a device. Raises UserError where a given table is of another machine."""

    def __init__(self, option: LtTuned, used: Used, note: Callable[[str], None]):
        self.used, self.strict = used, option.strict
        self.source = f"{option.table or 'shipped'}{' alone' * option.strict}"
        path = shipped(used.machine.arch) if option.table is None else Path(option.table)
        self.rows: dict[Shape, Found] = {}
        self.name = path.name
        if option.table is not None or path.is_file():
            table = read_table(path)
            misfit = table.misfit(used.machine.arch, used.version)
            if misfit and option.table is not None:
                raise UserError(f"gemm.table {path} was {misfit}")
            if not misfit:
                self.rows = dict(table.rows)
            note(f"{self.name}: {misfit or f'{len(self.rows)} shapes'}")

    def find(self, shape: Shape, tune: Callable[[], Found]) -> tuple[Found, bool]:
        """What to take for a shape, and whether it was tuned here. Raises UnsupportedError where `strict` has none."""
        here = self.used.device.index, shape
        found, tuned = self.rows.get(shape) or _here.get(here), shape not in self.rows
        if tuned and self.strict:
            raise UnsupportedError(f"gemm.strict: {self.name} has no row for {shape} on {self.used.machine.arch}")
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"gemm=lt_tuned: {shape} would be tuned inside of a capture")
            start = time.perf_counter()
            found = _here[here] = tune()
            seconds["tuning"] += time.perf_counter() - start
        self.used.rows[shape] = found
        return found, tuned


class Products:
    """The slot `matmul` of a stage, with what it has for each shape.

    name: by which compiled code finds it. It is the same for policies that take the same algorithms, so that the code
    of one serves the other; the youngest of them counts the products.
    """

    def __init__(self, stage: str, known: Known, linears: Sequence[Linear], note: Callable[[str], None]):
        self.stage, self.known, self.linears, self.note = stage, known, linears, note
        self.made: dict[Shape, Product] = {}
        self.tuned = self.not_first = 0
        self.name = f"{stage}, {known.source} on {known.used.device}"
        _living[next(_number)] = self

    def matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., N] of x [..., K], as `torch.nn.functional.linear`. Raises RuntimeError where they do not fit."""
        return lt_product(x, weight, bias, self.name) if torch.compiler.is_compiling() else self.launch(x, weight, bias)

    def launch(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `matmul`."""
        N, K = weight.shape
        if x.shape[-1] != K or x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
            raise RuntimeError(f"gemm=lt_tuned: x {list(x.shape)} of {x.dtype}, weight [{N}, {K}] of {weight.dtype}")
        rows = x.reshape(-1, K).contiguous()
        if rows.data_ptr() % ALIGNED:
            rows = rows.clone()
        if weight.data_ptr() % ALIGNED or not weight.is_contiguous():
            raise RuntimeError(f"gemm=lt_tuned: a weight [{N}, {K}] of {self.stage} is a part of another tensor")
        shape = Shape(rows.shape[0], N, K, bias is not None)
        if shape not in self.made:
            self.made[shape] = self._make(shape, rows, weight, bias)
        out = x.new_empty((*x.shape[:-1], N))
        self.made[shape](rows, weight, bias, out, self.known.used.workspace)
        return out

    def _make(self, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
        found, tuned = self.known.find(shape, lambda: fastest(x, self._weights(weight), bias))
        product = Problem(shape.M, shape.N, shape.K, shape.bias).product(found.algorithm)
        self.tuned += tuned
        self.not_first += found.us < found.first_us
        where = "tuned here" if tuned else self.known.name
        self.note(f"{self.stage}: {shape}: {found.us:.1f} us, the first suggestion {found.first_us:.1f} ({where})")
        return product

    def _weights(self, like: Tensor) -> list[Tensor]:
        """Those of this shape, from several layers, this one first."""
        others = [one.weight for one in self.linears if one.weight.shape == like.shape and one.weight is not like]
        others = [one for one in others if one.dtype == like.dtype and one.data_ptr() % ALIGNED == 0]
        return [like, *others][: layers_in_turns(*like.shape)]

    def counters(self) -> dict[str, float]:
        """See LtTuned."""
        return {
            f"cublaslt/products_{self.stage}": float(len(self.made)),
            f"cublaslt/not_first_{self.stage}": float(self.not_first),
            f"cublaslt/tuned_here_{self.stage}": float(self.tuned),
            "cublaslt/tune_s": seconds["tuning"],
        }


_living: "WeakValueDictionary[int, Products]" = WeakValueDictionary()
_number = count()


@torch.library.custom_op("pi0exp::lt_product", mutates_args=())
def lt_product(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """`Products.matmul` of that name, for compiled code: of the youngest that lives."""
    number = max(number for number, products in _living.items() if products.name == name)
    return _living[number].launch(x, weight, bias)


@lt_product.register_fake
def _(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
