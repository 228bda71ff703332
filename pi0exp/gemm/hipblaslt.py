"""Matrix products by AMD's hipBLASLt: the short form of `gemm=blas gemm.library=hipblaslt`."""

from dataclasses import dataclass

from pi0exp.gemm.blas import PRODUCTS, BlasOption, Library, prefer
from pi0exp.option import Numerics, Requires
from pi0exp.policy import Policy


@dataclass(frozen=True)
class HipBlasLt(BlasOption):
    """hipBLASLt wherever it implements the product, for the whole process. An architecture without it is an error.

    PyTorch's own choice on MI200, MI300 and, from ROCm 6.5, MI350; rocBLAS elsewhere (ROCm/pytorch pull request 2128).
    Numerics: other kernels. Proof: Tensile's kernels, which rocBLAS has as well. Has not run on AMD hardware.
    """

    requires = Requires(vendors=("amd",))
    numerics = Numerics.REORDERED

    def holds(self) -> str:
        return "hipblaslt"

    def proof(self) -> str:
        return PRODUCTS["amd"]

    def switch(self, policy: Policy) -> None:
        prefer(Library.hipblaslt)
        policy.note("all products of the process prefer hipblaslt")
