"""Matrix products by the BLAS library that PyTorch was built with (cuBLAS, rocBLAS, hipBLASLt, oneDNN).

PyTorch chooses the library for the whole process, so a choice holds for all stages and for attention's products, too.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

from pi0exp.config import Stack
from pi0exp.errors import UserError
from pi0exp.machine import Machine, missing_environment
from pi0exp.option import ANY_GPU, STAGES, Numerics, Requires, StagedOption
from pi0exp.policy import Policy


class Library(StrEnum):
    """Libraries by the names of their makers. auto leaves PyTorch's choice, which goes by product and architecture."""

    auto = "auto"
    cublas = "cublas"
    cublaslt = "cublaslt"
    rocblas = "rocblas"
    hipblaslt = "hipblaslt"


_VENDORS = {
    Library.cublas: ("nvidia",),
    Library.cublaslt: ("nvidia",),
    Library.rocblas: ("amd",),
    Library.hipblaslt: ("amd",),
}
_TORCH_NAMES = {
    Library.cublas: "cublas",
    Library.cublaslt: "cublaslt",
    Library.rocblas: "cublas",  # PyTorch for ROCm keeps CUDA's names
    Library.hipblaslt: "cublaslt",
}
PRODUCTS = {
    "nvidia": r"nvjet_|cutlass|xmma_gemm|gemm|gemv|splitKreduce",
    "amd": r"Cijk_",
}
"""Kernels of the vendor's libraries. cuBLAS and cuBLASLt run the same ones, and rocBLAS and hipBLASLt are both made of
Tensile's: the names show that a library multiplied, not which of the two."""

_OFF_LT = {"DISABLE_ADDMM_CUDA_LT": "1"}


def prefer(library: Library) -> None:
    """Let PyTorch prefer a library for whatever it implements. Raises RuntimeError where PyTorch chose otherwise."""
    name = _TORCH_NAMES[library]
    wanted = torch.backends.cuda.preferred_blas_library(name)
    found = torch.backends.cuda.preferred_blas_library()
    # On an architecture without hipBLASLt PyTorch warns and keeps the other one.
    expected = {"cublas": torch._C._BlasBackend.Cublas, "cublaslt": torch._C._BlasBackend.Cublaslt}[name]
    if wanted != expected or found != expected:
        raise RuntimeError(f"gemm: PyTorch did not take library={library} on this GPU, but {found}")


@dataclass(frozen=True)
class BlasOption(StagedOption):
    """An option about the BLAS library, of which PyTorch has one setting for the whole process.

    Subclasses override `holds` and `switch`.
    """

    def clashes(self, stack: Stack) -> list[str]:
        if not self.holds():
            return []
        if stack.gemm is not self:
            return [f"{self.holds()} holds for the whole process, not for one stage: choose it as gemm itself"]
        return [
            f"{self.holds()} holds for the whole process: {stage} cannot have BLAS settings of its own"
            for stage, part in self.parts()
            if stage and isinstance(part, BlasOption)
        ]

    def apply(self, policy: Policy) -> None:
        if any(self.at(stage) is self for stage in STAGES):
            self.switch(policy)
        super().apply(policy)

    def switch(self, policy: Policy) -> None:
        """Set it for the process."""


@dataclass(frozen=True)
class Blas(BlasOption):
    """`torch.nn.functional.linear`, by a library of choice.

    library: what torch.backends.cuda.preferred_blas_library is set to; it is used wherever it implements the product.
    addmm_lt: whether products with a bias may go through the library's Lt interface, which adds the bias in the same
    kernel. False sets DISABLE_ADDMM_CUDA_LT=1, which PyTorch reads at the first such product of a process
    (aten/src/ATen/native/cuda/Blas.cpp): the measuring process sets it before, the library's user has to. The plain
    model that the policy is compared with then runs without it as well.

    Numerics: a named library may choose other kernels; the bias interface is the same before and after.
    Proof: see PRODUCTS. Requires a GPU of the library's vendor; AMD's have not run here.
    """

    library: Library = Library.auto
    addmm_lt: bool = True

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        return Numerics.EXACT if self.library is Library.auto else Numerics.REORDERED

    def environment(self) -> dict[str, str]:
        """Variables that must be set before the process multiplies."""
        return {} if self.addmm_lt else dict(_OFF_LT)

    def unmet(self, machine: Machine) -> list[str]:
        reasons = []
        if vendors := _VENDORS.get(self.library):
            reasons += [f"library={self.library} {reason}" for reason in Requires(vendors).unmet(machine)]
        if not self.addmm_lt:
            reasons += [f"addmm_lt=false {reason}" for reason in ANY_GPU.unmet(machine)]
        return reasons

    def holds(self) -> str:
        chosen = [f"library={self.library}"] if self.library is not Library.auto else []
        chosen += ["addmm_lt=false"] if not self.addmm_lt else []
        return " and ".join(chosen)

    def proof(self) -> str:
        vendors = _VENDORS.get(self.library)
        return PRODUCTS[vendors[0]] if vendors else ""

    def switch(self, policy: Policy) -> None:
        if missing := missing_environment(self.environment()):
            raise UserError(
                f"gemm.addmm_lt=false: start Python with {' '.join(missing)} in its environment; PyTorch reads it once"
            )
        if not self.addmm_lt:
            policy.note("products with a bias keep off the Lt interface (DISABLE_ADDMM_CUDA_LT=1)")
        if self.library is not Library.auto:
            prefer(self.library)
            policy.note(f"all products of the process prefer {self.library}")
