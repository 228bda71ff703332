"""Products by cuBLASLt with an algorithm of one's own choice: a part of its C interface that PyTorch does not pass on.

PyTorch asks cuBLASLt's heuristics for one algorithm a shape and takes it. Here one asks for all that they suggest
(`Problem.suggestions`), writes a choice down as numbers (`Algorithm`), and multiplies with it (`Product`). Enumerations
and structures: NVIDIA's documentation of cuBLAS, chapter "Using the cuBLASLt API"; the numbers of an algorithm mean
something to the version only that told them.

Shapes: M rows, K of them multiplied, N columns of the result.
"""

import ctypes
import weakref
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import astuple, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pi0exp.errors import UserError

WORKSPACE = 64 * 2**20
"""Bytes that an algorithm may use to add up the parts of a sum."""
ALIGNED = 256
"""Bytes of which the heuristics take all addresses to be multiples; those of torch's own allocations are."""
_COMPUTE_32F, _R_32F, _R_16BF = 68, 0, 14  # CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16BF
_TRANSA, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # CUBLASLT_MATMUL_DESC_...
_TRANSPOSED, _BIAS = 1, 4  # CUBLAS_OP_T, CUBLASLT_EPILOGUE_BIAS
_MAX_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES


class CublasLtError(RuntimeError):
    """A call that cuBLASLt refused, with its status."""


class _Choice(ctypes.Structure):
    """cublasLtMatmulAlgo_t, opaque."""

    _fields_ = (("data", c_uint64 * 8),)


class _Suggestion(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", _Choice),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True)
class Algorithm:
    """What cublasLtMatmulAlgoConfigAttributes_t holds, in its order: the numbers of an algorithm, which can be kept."""

    id: int
    tile: int
    split_k: int
    reduction: int
    swizzle: int
    custom: int
    stages: int
    inner: int
    cluster: int


_TYPES = (c_int32, c_uint32, c_int32, c_uint32, c_uint32, c_uint32, c_uint32, c_uint16, c_uint16)


@cache
def library() -> ctypes.CDLL:
    """The cuBLASLt that PyTorch has loaded. Raises UserError where it has none."""
    if torch.version.cuda is None:
        raise UserError(f"cuBLASLt comes with torch for CUDA; torch {torch.__version__} is none")
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def call(name: str, *arguments: Any) -> None:
    """Raises CublasLtError."""
    status = getattr(library(), f"cublasLt{name}")(*arguments)
    if status:
        raise CublasLtError(f"cublasLt{name}: status {status}")


@cache
def handle() -> c_void_p:
    """Of the process."""
    made = c_void_p()
    call("Create", byref(made))
    return made


def version() -> int:
    """130100 for 13.1."""
    library().cublasLtGetVersion.restype = c_size_t
    return int(library().cublasLtGetVersion())


class Problem:
    """out[M, N] = x[M, K] w[N, K]^T + bias[N], all of bf16 with values of a row adjacent, summed in float32."""

    def __init__(self, M: int, N: int, K: int, bias: bool):
        self.M, self.N, self.K, self.bias = M, N, K, bias
        self._product = c_void_p()
        call("MatmulDescCreate", byref(self._product), _COMPUTE_32F, _R_32F)
        self._set(_TRANSA, c_int32(_TRANSPOSED))
        if bias:
            self._set(_EPILOGUE, c_uint32(_BIAS))
        # To cuBLASLt, for which columns are contiguous, this is w^T x = out^T.
        w, x, out = _layout(K, N), _layout(K, M), _layout(N, M)
        self._layouts = (w, x, out, out)
        weakref.finalize(self, _destroy, self._product, (w, x, out)).atexit = False

    def _set(self, attribute: int, value: Any) -> None:
        call("MatmulDescSetAttribute", self._product, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def suggestions(self, count: int) -> list[Algorithm]:
        """What the heuristics suggest, at most `count`, the one that they think best first."""
        preference, limit = c_void_p(), c_uint64(WORKSPACE)
        call("MatmulPreferenceCreate", byref(preference))
        found, number = (_Suggestion * count)(), c_int()
        try:
            call("MatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, byref(limit), c_size_t(8))
            call(
                "MatmulAlgoGetHeuristic", handle(), self._product, *self._layouts, preference, count, found,
                byref(number),
            )  # fmt: skip
        finally:
            call("MatmulPreferenceDestroy", preference)
        return [_read(one.algo) for one in found[: number.value] if not one.state]

    def product(self, algorithm: Algorithm) -> "Product":
        """Raises CublasLtError where the algorithm is none for this problem."""
        made, result = _Choice(), _Suggestion()
        types = _COMPUTE_32F, _R_32F, _R_16BF, _R_16BF, _R_16BF, _R_16BF
        call("MatmulAlgoInit", handle(), *types, algorithm.id, byref(made))
        for i, value in enumerate(astuple(algorithm)[1:], start=1):
            held = _TYPES[i](value)
            call("MatmulAlgoConfigSetAttribute", byref(made), i, byref(held), c_size_t(ctypes.sizeof(held)))
        call("MatmulAlgoCheck", handle(), self._product, *self._layouts, byref(made), byref(result))
        if result.state or result.workspace > WORKSPACE:
            raise CublasLtError(f"cublasLtMatmulAlgoCheck: state {result.state}, {result.workspace} bytes")
        return Product(self, made)


class Product:
    """A problem with its algorithm."""

    def __init__(self, problem: Problem, choice: _Choice):
        self._problem, self._choice = problem, choice

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor) -> None:
        """Launches on the current stream. x: [M, K]; weight: [N, K]; bias: [N]; out: [M, N]; each contiguous, at an
        address that is a multiple of ALIGNED. workspace: WORKSPACE bytes, for one product at a time. Raises
        CublasLtError.
        """
        problem = self._problem
        if bias is not None:
            problem._set(_BIAS_POINTER, c_void_p(bias.data_ptr()))
        w, x_layout, out_layout, _ = problem._layouts
        call(
            "Matmul", handle(), problem._product, byref(c_float(1.0)), c_void_p(weight.data_ptr()), w,
            c_void_p(x.data_ptr()), x_layout, byref(c_float(0.0)), c_void_p(out.data_ptr()), out_layout,
            c_void_p(out.data_ptr()), out_layout, byref(self._choice), c_void_p(workspace.data_ptr()),
            c_size_t(WORKSPACE), c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
        )  # fmt: skip


def _destroy(product: c_void_p, layouts: tuple[c_void_p, ...]) -> None:
    """What cuBLASLt keeps of a problem on the host."""
    call("MatmulDescDestroy", product)
    for layout in layouts:
        call("MatrixLayoutDestroy", layout)


def _layout(rows: int, columns: int) -> c_void_p:
    """Of a matrix whose columns lie one behind the other."""
    made = c_void_p()
    call("MatrixLayoutCreate", byref(made), _R_16BF, c_uint64(rows), c_uint64(columns), c_int64(rows))
    return made


def _read(choice: _Choice) -> Algorithm:
    values = []
    for i, (_, kind) in enumerate(zip(fields(Algorithm), _TYPES, strict=True)):
        held, written = kind(), c_size_t()
        call(
            "MatmulAlgoConfigGetAttribute", byref(choice), i, byref(held), c_size_t(ctypes.sizeof(held)), byref(written)
        )  # fmt: skip
        values.append(int(held.value))
    return Algorithm(*values)
