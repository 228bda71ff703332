"""A small interpreter for Gluon, which Triton has none for: the functions of a kernel run as Python, on torch tensors.

It shows that a kernel computes the right values at the right places. Layouts are ignored, copies are there at once and
barriers of all warps do nothing, so it does not show that programs wait where they must. Programs, and parts of their
warps, are threads that take turns only where they wait for one another.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

WAIT_S = 60.0
"""For other programs; beyond it they wait in a circle."""
_here = threading.local()
_changed = threading.Condition()


class Number(int):
    """A constant, which kernels take for a number, and what launches them asks for its value."""

    @property
    def value(self) -> int:
        return int(self)


class Pointer:
    """A place in a tensor's memory, or many: `at` counts its values from the first."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        self.tensor, self.at = tensor, at
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.tensor, self.at + other)

    def __sub__(self, other: Any) -> "Pointer":
        return self + -other

    @property
    def flat(self) -> Tensor:
        return self.tensor.as_strided((self.tensor.untyped_storage().nbytes() // self.tensor.element_size(),), (1,), 0)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def index(self, i: int) -> "Shared":
        return Shared(self.tensor[int(i)])

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.tensor.permute(*order))

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.tensor[start : start + length])

    def load(self, layout: object) -> Tensor:
        return self.tensor.clone()

    def store(self, value: Tensor) -> None:
        self.tensor.copy_(value)


def load(pointer: Pointer, mask: Any = None, other: Any = 0, cache_modifier: str = "") -> Any:
    at = torch.as_tensor(pointer.at)
    if mask is not None:
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(mask))
        found = pointer.flat[torch.where(mask, at, 0)]
        return torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype))
    return pointer.flat[at]


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at = torch.as_tensor(pointer.at)
    value = torch.as_tensor(value)
    shape = torch.broadcast_shapes(at.shape, value.shape, () if mask is None else torch.as_tensor(mask).shape)
    at, value = at.expand(shape), value.expand(shape)
    chosen = torch.ones(shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(shape)
    with _changed:
        pointer.flat[at[chosen]] = value[chosen].to(pointer.tensor.dtype)
        _changed.notify_all()


def atomic_add(pointer: Pointer, value: int, sem: str) -> int:
    with _changed:
        old = int(pointer.flat[int(pointer.at)])
        pointer.flat[int(pointer.at)] = old + value
        _changed.notify_all()
    return old


def wait_until(pointer: Pointer, count: int) -> None:
    with _changed:
        there = _changed.wait_for(lambda: _here.errors or int(pointer.flat[int(pointer.at)]) >= count, WAIT_S)
    assert there, "programs wait for one another"
    assert not _here.errors, "another program failed"


def load_block(described: Any, at: Sequence[int], ready: Shared, target: Shared, pred: Any = True) -> None:
    """Rows and columns beyond the tensor are zeros, as the copy engine has them."""
    if not pred:
        return
    rows, columns = target.tensor.shape
    part = described.base[at[0] : at[0] + rows, at[1] : at[1] + columns]
    target.tensor.zero_()
    target.tensor[: part.shape[0], : part.shape[1]] = part
    arrive(ready)


def arrive(bar: Shared) -> None:
    """The barrier's count of phases that are over goes up: all barriers are of one arrival."""
    with _changed:
        bar.tensor += 1
        _changed.notify_all()


def wait_for_phase(bar: Shared, phase: int) -> None:
    """Until the phase of this parity is over."""
    with _changed:
        there = _changed.wait_for(lambda: _here.errors or (int(bar.tensor) & 1) != phase, WAIT_S)
    assert there, "a warp waits for what does not come"
    assert not _here.errors, "another program failed"


def warp_specialize(parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Sequence[int], regs: Sequence[int]) -> Any:
    """All but the first part in threads of their own; what the first returns."""
    state, inference = dict(vars(_here)), torch.is_inference_mode_enabled()

    def work(function: Any, given: tuple[Any, ...]) -> None:
        vars(_here).update(state)
        try:
            with torch.inference_mode(inference):
                function(*given)
        except BaseException as error:
            with _changed:
                _here.errors.append(error)
                _changed.notify_all()

    threads = [threading.Thread(target=work, args=part, daemon=True) for part in parts[1:]]
    for thread in threads:
        thread.start()
    function, given = parts[0]
    made = function(*given)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a part of the warps has not ended"
    assert not _here.errors, "a part of the warps failed"
    return made


def product(left: Any, right: Any, acc: Tensor, is_async: bool = False) -> Tensor:
    a, b = (one.tensor if isinstance(one, Shared) else one for one in (left, right))
    made: Tensor = acc + a.float() @ b.float()
    return made


def elementwise(function: Any) -> Any:
    return lambda x: function(torch.as_tensor(x))


def either(condition: Any, one: Any, other: Any) -> Any:
    if not isinstance(condition, Tensor):
        return one if condition else other
    return torch.where(condition, one, other)


def pair(tensor: Any, scalar: Any) -> Any:
    """min or max of scalars and tensors alike."""
    return lambda a, b: tensor(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else scalar(a, b)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


LANGUAGE = SimpleNamespace(
    float32=torch.float32, bfloat16=torch.bfloat16, int64=torch.int64, int32=torch.int32, int1=torch.bool,
    constexpr=triton.language.constexpr, SliceLayout=lambda dim, parent: None,
    arange=lambda begin, end, layout=None: torch.arange(begin, end),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    reshape=lambda x, shape: x.reshape(shape), permute=lambda x, order: x.permute(*order),
    convert_layout=lambda x, layout, assert_trivial=False: x, split=lambda x: (x[..., 0], x[..., 1]),
    sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis), where=either, cast=cast,
    minimum=pair(torch.minimum, min), maximum=pair(torch.maximum, max), to_tensor=lambda x: x, static_range=range,
    exp=elementwise(torch.exp), sigmoid=torch.sigmoid, debug_barrier=lambda: None,
    exp2=elementwise(torch.exp2), rsqrt=elementwise(torch.rsqrt), load=load, store=store,
    atomic_add=atomic_add, program_id=lambda axis: _here.program, num_programs=lambda axis: _here.programs,
    allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.zeros(shape, dtype=dtype)),
    warp_specialize=warp_specialize,
)  # fmt: skip
MBARRIER = SimpleNamespace(
    init=lambda bar, count: None, expect=lambda bar, size, pred=True: None, wait=wait_for_phase, arrive=arrive,
    MBarrierLayout=lambda: None,
)  # fmt: skip
NAMES = {
    "gl": LANGUAGE, "tl": LANGUAGE,  # functions of Triton that Gluon's call
    "mbarrier": MBARRIER, "load_block": load_block, "barrier": lambda: None, "mma_v2": product,
    "warpgroup_mma": product, "warpgroup_mma_wait": lambda outstanding, deps: deps[0],
    "fence_async_shared": lambda: None, "order_copies": lambda i: None, "wait_until": wait_until,
}  # fmt: skip


class Launcher:
    """Stands in for a kernel: kernel[grid](arguments) runs its programs, each in a thread of its own."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(num_warps: int, launch_cooperative_grid: bool = False, **arguments: Any) -> None:
            given = {
                name: Pointer(value, value.storage_offset()) if name.endswith("_ptr") and value is not None else value
                for name, value in arguments.items()
            }
            errors: list[BaseException] = []
            inference = torch.is_inference_mode_enabled()  # a thread has a mode of its own

            def program(number: int) -> None:
                _here.program, _here.programs, _here.errors = number, grid[0], errors
                try:
                    with torch.inference_mode(inference):
                        self.function(**given)
                except BaseException as error:
                    with _changed:
                        errors.append(error)
                        _changed.notify_all()

            threads = [threading.Thread(target=program, args=(number,), daemon=True) for number in range(grid[0])]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(2 * WAIT_S)
            if errors:
                raise errors[0]

        return launch


@contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Meanwhile the kernels of these modules run as Python, the functions that they call among them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, value in list(vars(module).items()):
                if name in NAMES:
                    patch.setattr(module, name, NAMES[name])
                elif isinstance(value, triton.language.constexpr) and isinstance(value.value, int):
                    patch.setattr(module, name, Number(value.value))
                elif isinstance(value, JITFunction):
                    patch.setattr(module, name, Launcher(value.fn) if name.endswith("_kernel") else value.fn)
        yield
