"""PyTorch's TunableOp: for each product the candidate of the BLAS libraries that was fastest when tried here.

What there is to choose from depends on the build. For ROCm, PyTorch tries every kernel of rocBLAS and hipBLASLt. For
CUDA, torch 2.11 to 2.13 has a single candidate, cuBLAS's own choice, called `Default`
(aten/src/ATen/cuda/tunable/README.md and TunableGemm.h): there every line of the table says Default and nothing can be
gained. `tunable/not_default` counts the lines that say something else.

TunableOp is a switch of the process: it holds for all stages, for attention's products, and from then on for whatever
else this process multiplies. Its copies of the operands of a batched product are as large as batch strides and dense
shapes say; rows that are further apart than they are wide are forgotten (GemmStridedBatchedParams in
aten/src/ATen/cuda/tunable/GemmCommon.h, torch 2.11 to 2.13), and candidates read beyond them. Keys and values that
stand side by side in one buffer are such rows. Plain attention, with which every stack is verified before it has its
own, multiplies them as batches: such a stack ended in an illegal memory access (H200, torch 2.11, 2026-11-24).
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.cuda import tunable

from pi0exp.config import Stack
from pi0exp.errors import UserError
from pi0exp.fusion.fusion import Fusion
from pi0exp.gemm.blas import BlasOption
from pi0exp.model.observation import Observation, Structure
from pi0exp.option import ANY_GPU, Numerics
from pi0exp.policy import DeviceCall, Policy

Row = tuple[str, str, str, float]
"""Operator, shape, candidate and its milliseconds, as TunableOp has them."""

TABLE = "tunableop.csv"
"""The file that is kept with the result."""


# PyTorch declares the types of these two as one entry; they return a tuple of entries.
def tuned() -> list[Row]:
    """What TunableOp has found or read so far."""
    return list(cast(Any, tunable.get_results()))


def validators() -> dict[str, str]:
    """Versions and architecture, to which a table is bound."""
    return dict(cast(Any, tunable.get_validators()))


@dataclass(frozen=True)
class Tunable(BlasOption):
    """Tuned in the first call of each structure, outside of any capture; products of a table are not tuned again.

    table: a table that an earlier run kept; its Validator lines must be this machine's. What the table lacks is
    tuned here, and counted: tunable/tuned_here.
    max_duration_ms, max_iterations: the most that one candidate is tried, whichever ends first (PyTorch: 30 and 100).
    rotating_buffer_mb: copies of the operands that are used in turn, so that they do not come from the cache; null is
    as much as the L2 cache holds, 0 is none.

    Numerics: other kernels. Proof: none by name, since the kernels are the libraries' own; a table that is still
    empty after a call is an error instead. Source: torch.cuda.tunable. Has not run on AMD hardware.
    """

    requires = ANY_GPU
    numerics = Numerics.REORDERED

    table: str | None = None
    max_duration_ms: int = 30
    max_iterations: int = 100
    rotating_buffer_mb: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_duration_ms", "max_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.rotating_buffer_mb is not None and self.rotating_buffer_mb < 0:
            raise ValueError(f"rotating_buffer_mb is {self.rotating_buffer_mb}; it must not be negative")
        if self.table is not None:
            read_table(self.table)

    def clashes(self, stack: Stack) -> list[str]:
        fusion, reasons = stack.fusion, super().clashes(stack)
        if isinstance(fusion, Fusion) and (fusion.rope or fusion.rewrites.cache_room or fusion.rewrites.hoist_state):
            reasons.append(
                "TunableOp reads beyond its copies of keys and values that share a buffer, as those of fusion.rope,"
                " cache_room and hoist_state do"
            )
        return reasons

    def files(self) -> list[str]:
        return [] if self.table is None else [self.table]

    def holds(self) -> str:
        return "tunable"

    def switch(self, policy: Policy) -> None:
        # TunableOp reads this file at its first use and appends to it; tables are read and kept by us.
        tunable.set_filename(os.devnull)
        tunable.enable(True)
        tunable.tuning_enable(True)
        tunable.set_max_tuning_duration(self.max_duration_ms)
        tunable.set_max_tuning_iterations(self.max_iterations)
        if self.rotating_buffer_mb is not None:
            tunable.set_rotating_buffer_size(self.rotating_buffer_mb)
        self._check_switches()
        tunable.tuning_enable(False)
        # The validators of the libraries are known once a product has been called.
        row_BK = torch.zeros(8, 8, dtype=torch.bfloat16, device=policy.device)
        torch.nn.functional.linear(row_BK, row_BK)
        if self.table is not None:
            load_table(self.table)
        tuning = Tuning(len(tuned()))
        policy.wrap_call(tuning.wrap, "TunableOp, tuned in the first call of each structure")
        policy.count_with(tuning.counters)
        policy.attach_with(lambda: {TABLE: table_text(validators(), tuned())})

    def _check_switches(self) -> None:
        """Raises UserError where variables of the environment, which PyTorch prefers, say something else."""
        wanted = {
            "ENABLED": (True, tunable.is_enabled()),
            "TUNING": (True, tunable.tuning_is_enabled()),
            "MAX_TUNING_DURATION_MS": (self.max_duration_ms, tunable.get_max_tuning_duration()),
            "MAX_TUNING_ITERATIONS": (self.max_iterations, tunable.get_max_tuning_iterations()),
        }
        for name, (ours, found) in wanted.items():
            if found != ours:
                raise UserError(
                    f"gemm: PYTORCH_TUNABLEOP_{name} makes TunableOp use {found} instead of {ours}: unset it"
                )


class Tuning:
    """Switches tuning on for the first call of each structure, and counts.

    tunable/products: different products that the table holds. tunable/not_default: those for which another candidate
    than PyTorch's own was faster. tunable/from_table, tunable/tuned_here: where they come from. tunable/tune_s: seconds
    of the calls in which tuning was on, which are part of the first call of a structure.
    """

    def __init__(self, from_table: int) -> None:
        self.from_table = from_table
        self.seconds = 0.0
        self._seen: set[tuple[Structure, torch.Size]] = set()

    def wrap(self, call: DeviceCall) -> DeviceCall:
        def tune_first(observation: Observation, noise_BCA: Tensor) -> Tensor:
            key = observation.structure, noise_BCA.shape
            if key in self._seen:
                return call(observation, noise_BCA)
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("gemm=tunable: this structure would be tuned inside of a capture")
            start = time.perf_counter()
            tunable.tuning_enable(True)
            try:
                actions_BCA = call(observation, noise_BCA)
                torch.cuda.synchronize()
            finally:
                tunable.tuning_enable(False)
            self.seconds += time.perf_counter() - start
            if not tuned():
                raise RuntimeError(
                    "gemm=tunable: no product of the policy came by TunableOp, which knows BLAS products only"
                )
            self._seen.add(key)
            return actions_BCA

        return tune_first

    def counters(self) -> dict[str, float]:
        rows = tuned()
        return {
            "tunable/products": float(len(rows)),
            "tunable/not_default": float(sum(candidate != "Default" for _, _, candidate, _ in rows)),
            "tunable/from_table": float(self.from_table),
            "tunable/tuned_here": float(len(rows) - self.from_table),
            "tunable/tune_s": self.seconds,
        }


def read_table(path: str) -> tuple[dict[str, str], list[list[str]]]:
    """Validators and rows (operator, shape, candidate, milliseconds) of a table. Raises ValueError, one line."""
    try:
        lines = [line.split(",") for line in Path(path).read_text().splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"table {path} cannot be read: {error}") from error
    bound_to = {line[1]: ",".join(line[2:]) for line in lines if line[0] == "Validator" and len(line) > 2}
    rows = [line for line in lines if line[0] != "Validator"]
    if not bound_to or not rows or any(len(row) not in (3, 4) for row in rows):
        raise ValueError(f"table {path} is no table of TunableOp: Validator lines, then operator,shape,candidate,ms")
    return bound_to, rows


def differences(table: dict[str, str], here: dict[str, str]) -> list[str]:
    """Which validators of a table are not those of this machine, a phrase each."""
    return [
        f"{name} is {table.get(name, 'missing')} in the table and {here.get(name, 'missing')} here"
        for name in sorted(table | here)
        if table.get(name) != here.get(name)
    ]


def load_table(path: str) -> None:
    """Take over a table. Raises UserError where it was tuned on another machine or PyTorch does not take it."""
    bound_to, rows = read_table(path)
    if differing := differences(bound_to, validators()):
        raise UserError(f"gemm.table {path} was tuned elsewhere: {'; '.join(differing)}")
    if not tunable.read_file(path):
        raise UserError(f"gemm.table {path}: PyTorch does not take it")
    taken = {(operator, shape): candidate for operator, shape, candidate, _ in tuned()}
    if lost := [row for row in rows if taken.get((row[0], row[1])) != row[2]]:
        raise UserError(f"gemm.table {path}: PyTorch did not take {len(lost)} lines, the first is {','.join(lost[0])}")


def table_text(bound_to: Mapping[str, str], rows: Sequence[Row]) -> str:
    """A table in TunableOp's own form, so that it can be read again."""
    named = [f"Validator,{name},{value}" for name, value in bound_to.items()]
    lines = [f"{operator},{shape},{candidate},{ms:.6g}" for operator, shape, candidate, ms in rows]
    return "\n".join([*named, *lines]) + "\n"
