"""Everything in float32, RoPE frequencies exact."""

from dataclasses import dataclass

from pi0exp.model.precision import FP32, FP32_TRUTH
from pi0exp.precision.option import PrecisionOption


@dataclass(frozen=True)
class Fp32(PrecisionOption):
    model = FP32
    truth = FP32_TRUTH
