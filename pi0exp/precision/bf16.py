"""The original's served policy: bfloat16 transformers, float32 norms and projections, rounded RoPE frequencies."""

from dataclasses import dataclass

from pi0exp.model.precision import BF16, BF16_TRUTH
from pi0exp.precision.option import PrecisionOption


@dataclass(frozen=True)
class Bf16(PrecisionOption):
    model = BF16
    truth = BF16_TRUTH
