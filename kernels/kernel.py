"""The contract of a kernel file: an op, the reference it must agree with, and the cases it is tested and timed on.

A file `kernels/NAME.py` stands in this order: the maths, the reference, the Triton code, the op
(`torch.library.triton_op`, so that Inductor sees into it), and `KERNELS`, a tuple with a `Kernel` for every op of the
file, which `kernels.bench` and the tests find. How an op is compared with its reference stands at the end of this file.

Shapes: B batch, T tokens, D width; every op takes any leading axes for which one stride each can be given.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels run on the CPU, program by program. Its `tl.dot` is wrong on bfloat16 (it multiplies the
bit patterns), so kernels take a constexpr UPCAST, which is this value, and widen the operands first if it is true. It
cuts float32 off to bfloat16 where hardware rounds to the nearest: an error of one rounding, not half of one."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What the memory-bound kernels take; they compute in float32."""


@dataclass(frozen=True)
class Case:
    """Arguments of the op at one size.

    name: what it is in Pi0, or which oddity it has. make: (generator on the device, device) -> the op's arguments.
    flops, bytes_moved: the least work of one call; bytes count every input read once and every output written once.
    pi0: a real shape of the policy, hence timed; others are there to be tested. small: quick under the interpreter.
    mutates: positions of the arguments that the op writes to; they are compared too. terms: how many products a value
    sums, where the op may sum them in another order than the reference.
    """

    name: str
    make: Callable[[torch.Generator, torch.device], tuple[Any, ...]]
    flops: float = 0.0
    bytes_moved: float = 0.0
    pi0: bool = True
    small: bool = False
    mutates: tuple[int, ...] = ()
    terms: int = 0


@dataclass(frozen=True)
class AheadOfTime:
    """One compile of a Triton function without a GPU.

    types: argument -> "*bf16:16", "i32", "fp32" (":16" promises divisibility by 16); constants: the constexprs.
    dots: matrix instructions must show up. targets: what it is compiled for; a launch chosen for one architecture names
    that one.
    """

    name: str
    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    dots: bool = False
    targets: tuple[str, ...] = ("gfx942", "gfx950", "sm_90")


@dataclass(frozen=True)
class Kernel:
    """A kernel family.

    op: the operator. reference: the shortest true statement of the same maths, same arguments, same result; it computes
    in the widest dtype among its arguments' and float32, and rounds once. libraries: name -> callable with the same
    arguments, a kernel of a library that computes the same and is timed beside it; it raises NotImplementedError for a
    case that it is not made for. interpretable: Triton's interpreter can run it, which it cannot where a kernel is
    written in Gluon (`tests/test_gluon.py` has one of its own). not_compiled: why the bench does not let torch.compile
    of the reference take part; "" where it does.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    ahead_of_time: tuple[AheadOfTime, ...]
    libraries: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    interpretable: bool = True
    not_compiled: str = ""


def discover() -> dict[str, Kernel]:
    """The kernels of all files in this folder, by name, sorted.

    A file has them in KERNELS, or its only one in KERNEL. Raises TypeError where a file defines an op and has neither,
    or two kernels have one name: nothing here goes untested.
    """
    found: dict[str, Kernel] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in ("__init__", "kernel", "bench") or path.stem.startswith("tune"):
            continue
        module = importlib.import_module(f"{__package__}.{path.stem}")
        kernels = getattr(module, "KERNELS", ()) or ((module.KERNEL,) if hasattr(module, "KERNEL") else ())
        if not kernels and any(isinstance(value, CustomOpDef) for value in vars(module).values()):
            raise TypeError(f"kernels/{path.name} defines an op, but no KERNELS to test it by")
        for kernel in kernels:
            if kernel.name in found:
                raise TypeError(f"kernels/{path.name}: there is another kernel {kernel.name!r}")
            found[kernel.name] = kernel
    return dict(sorted(found.items()))


def random(
    generator: torch.Generator, device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def launchable(function: Any) -> Any:
    """`torch.library.wrap_triton`, or the function as it is where it is interpreted, which older torch cannot wrap."""
    return function if INTERPRETED else torch.library.wrap_triton(function)


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message): the arguments do not fit the op."""
    if not condition:
        raise ValueError(message)


def as_rows(x: Tensor) -> Tensor:
    """A view [B, T, D] of x [..., D] for kernels that know one stride for B and one for T; never a copy.

    Raises ValueError where the values of a row are not adjacent, where x is no bfloat16, float16 or float32, or where B
    is beyond the 65535 that a second grid axis takes; RuntimeError where one stride cannot describe the leading axes.
    """
    require(x.dtype in FLOATS, f"{x.dtype} is none of {FLOATS}")
    require(x.stride(-1) == 1 or x.shape[-1] == 1, f"values of a row must be adjacent; their stride is {x.stride(-1)}")
    x_BTD = x if x.ndim == 3 else x.view(-1, x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])
    require(x_BTD.shape[0] < 2**16, f"{x_BTD.shape[0]} batches of rows: a grid takes 65535")
    return x_BTD


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors' and float32, in which references compute."""
    dtype = torch.float32
    for x in tensors:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    return dtype


@dataclass(frozen=True)
class Comparison:
    """Errors of one output against the truth: the reference on the arguments in float64.

    largest: over the values. l2: of the whole tensor, relative. `eager_` is the reference on the arguments as they are.
    wrong: what breaks the rule, "" if nothing does.
    """

    output: str
    largest: float
    l2: float
    eager_largest: float
    eager_l2: float
    wrong: str


def compare(output: str, found: Tensor, eager: Tensor, exact: Tensor, terms: int = 0) -> Comparison:
    """The rule for a tensor: twice the eager reference's error, and one rounding to the output's dtype, may be reached.

    Of every value: |found - exact| <= 2 max|eager - exact| + u |exact|, and in the L2 norm of the whole alike. u is
    half the spacing of the dtype's numbers, as rounding is to the nearest. A float32 result of `terms` products may be
    off by another sqrt(terms) u: what summation in an unlucky order costs (Higham, Accuracy and Stability of Numerical
    Algorithms, section 4.2, for rounding errors of random sign); in narrower outputs their own rounding hides it.
    A NaN breaks the rule. Integers and truth values must be equal.
    """
    if (found.shape, found.dtype) != (eager.shape, eager.dtype):
        form = f"is {found.dtype} {tuple(found.shape)}, the reference {eager.dtype} {tuple(eager.shape)}"
        nan = float("nan")
        return Comparison(output, nan, nan, nan, nan, form)
    if not found.numel():
        return Comparison(output, 0.0, 0.0, 0.0, 0.0, "")
    if not found.is_floating_point():
        differing = int((found != eager).sum())
        return Comparison(output, 0.0, 0.0, 0.0, 0.0, f"{differing} of {found.numel()} differ" if differing else "")
    u = torch.finfo(found.dtype).eps / 2
    size, off, eager_off = exact.double().abs(), (found - exact.double()).abs(), (eager - exact.double()).abs()
    largest, eager_largest, excess = (float(x.max()) for x in (off, eager_off, off - u * size))
    norm, l2, eager_l2 = (float(torch.linalg.vector_norm(x)) for x in (size, off, eager_off))
    order = terms**0.5 * u if found.dtype == torch.float32 else 0.0
    reasons = []
    if not excess <= (allowed := 2 * eager_largest + order * float(size.max())):
        reasons.append(f"a value is off by {excess:.3e} beyond its rounding; allowed are {allowed:.3e}")
    if not l2 <= (allowed := 2 * eager_l2 + (u + order) * norm):
        reasons.append(f"L2 error {l2:.3e}; allowed are {allowed:.3e}")
    scale = norm or 1.0
    return Comparison(output, largest, l2 / scale, eager_largest, eager_l2 / scale, "; ".join(reasons))


def results(call: Callable[..., Any], case: Case, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns and what it wrote to, tensor by tensor."""
    returned = call(*arguments)
    tensors = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return tensors + [arguments[position] for position in case.mutates]


def arguments_of(case: Case, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """The case's arguments, the same for the same seed on the same device."""
    return case.make(torch.Generator(device).manual_seed(seed), device)


def double(x: Any) -> Any:
    """Floating tensors in float64, all else as it is."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(kernel: Kernel, case: Case, device: torch.device, call: Callable[..., Any] | None = None) -> list[Comparison]:
    """Runs the op, or another `call` with its arguments, and compares every tensor that comes of it."""
    found = results(call or kernel.op, case, arguments_of(case, device))
    eager = results(kernel.reference, case, arguments_of(case, device))
    exact = results(kernel.reference, case, tuple(map(double, arguments_of(case, device))))
    names = [f"result {i}" for i in range(len(eager) - len(case.mutates))]
    names += [f"argument {position}" for position in case.mutates]
    return [compare(*four, case.terms) for four in zip(names, found, eager, exact, strict=True)]
