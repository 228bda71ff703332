"""Matrix products by the BLAS library that PyTorch was built with (cuBLAS, hipBLASLt, oneDNN)."""

from dataclasses import dataclass

from pi0exp.option import StagedOption


@dataclass(frozen=True)
class Blas(StagedOption):
    """Leave `torch.nn.functional.linear` in place."""
