"""AMD's aiter without AMD hardware: modules with the recorded signatures, whose functions check and compute.

Each call is bound to the signature of `data/aiter_signatures.json`, so that a wrong keyword or one argument too many
fails as in aiter; names that aiter does not have fail likewise. The bodies check what aiter's Python and C++ check, and
compute the result with PyTorch, so that a wrong layout gives a wrong number.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

import ast
import csv
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SIGNATURES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data/aiter_signatures.json").read_text())
TAG = "v0.1.20.post1"
COLUMNS = (
    *("gfx", "cu_num", "M", "N", "K", "bias", "dtype", "outdtype", "scaleAB", "bpreshuffle"),
    *("libtype", "solidx", "splitK", "kernelName"),
)
"""Of a tuned table: what a row is found by, and what is read of it."""
PLAIN = "_ZN5aiter37bf16gemm_fp32bf16_tn_96x64_pf3_splitkE"
SHUFFLED = "_ZN5aiter43bf16gemm_fp32bf16_tn_128x64_bshuffle_splitkE"
SPLIT = "_ZN5aiter39bf16gemm_fp32bf16_tn_64x64_splitk_cleanE"
WIDE = "_ZN5aiter24bf16gemm_bf16_tn_256x256E"
"""Assembly kernels: for plain and for shuffled weights, one that splits K, one without bias."""


def signature_of(text: str) -> inspect.Signature:
    """The signature that "(a, b=0) -> T" says: names, kinds and whether there is a default."""
    (function,) = ast.parse(f"def f{text}: ...").body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    assert not any([arguments.posonlyargs, arguments.kwonlyargs, arguments.vararg, arguments.kwarg])
    defaults = [_default(node) for node in arguments.defaults]
    padded = [inspect.Parameter.empty] * (len(arguments.args) - len(defaults)) + defaults
    return inspect.Signature(
        [
            inspect.Parameter(argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
            for argument, default in zip(arguments.args, padded, strict=True)
        ]
    )


def _default(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)  # such as dtypes.bf16


@dataclass
class FakeAiter:
    """What stands in for the package. calls: (name, arguments) of each. flagged: what aiter would do, but nobody wants.

    gfx, compute_units: the GPU that it finds. table: AITER_CONFIG_GEMM_BF16 as it was when `aiter` was imported.
    """

    gfx: str = "gfx950"
    compute_units: int = 256
    table: str | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)

    def function(self, name: str) -> Callable[..., Any]:
        signature = signature_of(SIGNATURES[name]["signature"])

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from error
            bound.apply_defaults()
            self.calls.append((name, bound.arguments))
            if name not in BODIES:
                raise NotImplementedError(f"no reference for {name}")
            return BODIES[name](self, **bound.arguments)

        return call

    def called(self, name: str) -> list[dict[str, Any]]:
        return [arguments for other, arguments in self.calls if other == name]


def attention(fake: FakeAiter, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, **rest: Any) -> Tensor:
    """Without mask; [B, T, N, H], [B, S, K, H]. The checks of `mha_fwd_kernels.cu`."""
    if rest["bias"] is not None or rest["causal"] or rest["dropout_p"] or rest["alibi_slopes"] is not None:
        raise NotImplementedError("only plain attention has a reference")
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]):
        raise RuntimeError(f"shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)):
        raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, not {q.dtype}")
    if q.shape[3] != k.shape[3] or q.shape[3] > 256 or q.shape[2] % k.shape[2]:
        raise RuntimeError(f"heads {q.shape[2]} of {q.shape[3]} on {k.shape[2]} of {k.shape[3]}")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if 0 in (k.stride(2), v.stride(2)) and k.shape[2] > 1:
        fake.flagged.append("key/value heads were copied for the query heads")
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale).transpose(1, 2)


def gemm_config(
    fake: FakeAiter,
    M: int,
    N: int,
    K: int,
    bias: bool,
    dtype: str,
    otype: str,
    scaleAB: bool,
    bpreshuffle: bool,
) -> dict[str, Any]:
    """The row of the table that was given in the environment, else what aiter does without one."""
    assert fake.table is not None
    with open(fake.table) as file:
        reader = csv.DictReader(file)
        if "gfx" not in (reader.fieldnames or []):
            raise KeyError("None of ['gfx'] are in the columns")
        rows = {tuple(line[name] for name in COLUMNS[:10]): line for line in reader}
    steps = ((256, 16), (1024, 32), (4096, 64), (1 << 62, 128))
    step = next(step for limit, step in steps if limit >= M)
    power = 1
    while power < M:
        power *= 2
    coarse = 8192 if M > 8192 and N > 4096 else power
    for m in (M, (M + step - 1) // step * step, coarse):
        key = (fake.gfx, fake.compute_units, m, N, K, bias, dtype, otype, scaleAB, bpreshuffle)
        if (line := rows.get(tuple(map(str, key)))) is not None:
            return {**line, "kernelName": line["kernelName"] or float("nan")}  # as pandas reads an empty cell
    if bpreshuffle and fake.gfx == "gfx942":
        return {"libtype": "hipblaslt", "solidx": -1, "kernelName": ""}
    if bpreshuffle:
        assert (N % 64, K % 64) == (0, 0), "no solution"
        return {"libtype": "asm", "solidx": 0, "kernelName": None}
    return {"libtype": "torch", "solidx": 0}


def gemm(fake: FakeAiter, A: Tensor, B: Tensor, bias: Tensor | None, otype: Any, **scales: Any) -> Tensor:
    """A [..., K] times B [N, K], in the order of `shuffle_weight` where B says so."""
    if not A.is_contiguous() and A.ndim > 2:
        fake.flagged.append("activations that cannot be viewed as a matrix: aiter calls F.linear")
    if A.shape[-1] != B.shape[1] or (bias is not None and bias.shape != B.shape[:1]):
        raise RuntimeError(f"{list(A.shape)} times {list(B.shape)}")
    if A.dtype != torch.bfloat16 or B.dtype != torch.bfloat16:
        raise RuntimeError(f"{A.dtype} times {B.dtype}")
    if not A.is_contiguous() or not B.is_contiguous():
        raise RuntimeError("A and B must be contiguous")
    shuffled = getattr(B, "is_shuffled", False) is True
    m, kind = A.numel() // A.shape[-1], str(A.dtype)
    config = gemm_config(fake, m, B.shape[0], B.shape[1], bias is not None, kind, kind, False, shuffled)
    if config["libtype"] in ("torch", "skinny", "triton", "opus"):
        assert not shuffled, f"bpreshuffle is not supported in {config['libtype']}_gemm!"
    return F.linear(A, unshuffled(B) if shuffled else B, bias)


def shuffle(fake: FakeAiter, x: Tensor, layout: tuple[int, int], use_int4: bool, **rest: Any) -> Tensor:
    """16-bit weights in tiles of 16 x 32; within a tile four groups of eight columns, each with all its rows."""
    assert (layout, x.itemsize, use_int4, any(rest.values())) == ((16, 16), 2, False, False)
    assert x.shape[0] % 16 == 0, f"{x.shape[0]} % 16"
    assert x.shape[1] % 32 == 0, f"{x.shape[1]} % 32"
    tiles = x.reshape(x.shape[0] // 16, 16, x.shape[1] // 32, 4, 8)
    made = tiles.permute(0, 2, 3, 1, 4).contiguous().reshape(x.shape)
    made.is_shuffled = True  # type: ignore[attr-defined]
    return made


def unshuffled(weight: Tensor) -> Tensor:
    tiles = weight.reshape(weight.shape[0] // 16, weight.shape[1] // 32, 4, 16, 8)
    return tiles.permute(0, 3, 1, 2, 4).reshape(weight.shape)


BODIES: dict[str, Callable[..., Any]] = {
    "aiter.flash_attn_func": attention,
    "aiter.tuned_gemm.gemm_a16w16": gemm,
    "aiter.tuned_gemm.get_GEMM_A16W16_config": gemm_config,
    "aiter.ops.shuffle.shuffle_weight": shuffle,
    "aiter.jit.utils.chip_info.get_gfx": lambda fake: fake.gfx,
    "aiter.jit.utils.chip_info.get_cu_num": lambda fake: fake.compute_units,
}


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `aiter` and its modules; the package lies in `folder` as far as files are asked for."""

    def __init__(self, fake: FakeAiter, folder: Path):
        self.fake, self.folder = fake, folder
        parents = [name.rpartition(".")[0] for name in SIGNATURES]
        self.modules = {
            ".".join(parts[:end])
            for parts in (parent.split(".") for parent in parents)
            for end in range(1, len(parts) + 1)
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.modules:
            return None
        spec = importlib.util.spec_from_loader(name, self, is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(self.folder.joinpath(*name.split(".")))]
        return spec

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name == "aiter":
            self.fake.table = os.environ.get("AITER_CONFIG_GEMM_BF16")
        for full in SIGNATURES:
            parent, _, own = full.rpartition(".")
            if parent == name:
                setattr(module, own, self.fake.function(full))

        def missing(attribute: str) -> Any:
            raise AttributeError(f"aiter {TAG} has no {name}.{attribute}")

        module.__getattr__ = missing  # type: ignore[method-assign]


def install(patch: pytest.MonkeyPatch, folder: Path, **facts: Any) -> FakeAiter:
    """Let `import aiter` give a fake, as if it were installed in `folder`, until the test ends."""
    (folder / "aiter" / "ops").mkdir(parents=True)
    (folder / "aiter" / "ops" / "mha.py").write_text("")
    fake = FakeAiter(**facts)
    importer = Importer(fake, folder)
    for name in importer.modules:
        # Set and removed, so that the end of the test removes what the test imports.
        patch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
    patch.setattr(sys, "meta_path", [importer, *sys.meta_path])
    patch.setenv("AITER_CONFIG_GEMM_BF16", "")  # whatever the test sets is gone with it
    return fake


def row(**cells: object) -> dict[str, str]:
    """One row of a tuned table, of an assembly kernel unless said otherwise."""
    shape = {"gfx": "gfx950", "cu_num": 256, "M": 16, "N": 2048, "K": 1024, "bias": False}
    kinds = {"dtype": "torch.bfloat16", "outdtype": "torch.bfloat16", "scaleAB": False, "bpreshuffle": False}
    kernel = {"libtype": "asm", "solidx": 0, "splitK": 1, "kernelName": PLAIN}
    return {name: str(value) for name, value in {**shape, **kinds, **kernel, **cells}.items()}


def table(folder: Path, *rows: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> Path:
    """The file `tuned.csv` of these rows."""
    lines = [",".join(columns), *(",".join(each[name] for name in columns) for each in rows)]
    path = folder / "tuned.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
