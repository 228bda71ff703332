"""How the numbers of the model are held: the original's bf16 policy, float32, and the truths both are judged by."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Kept in float32 by the bf16 policy although they belong to a transformer: the patch and position embedding of the
# vision tower and whatever is named "norm" in the two Gemmas (so also the dense layers of adaptive norms).
_FLOAT32_INSIDE = ("vision.patch.", "vision.position")
_GEMMAS = ("paligemma.", "expert.")
TRANSFORMERS = ("vision.", "embedding.", *_GEMMAS)
"""Prefixes of the parameters that the bf16 policy casts; the projections around them keep the checkpoint's values."""


@dataclass(frozen=True)
class Precision:
    """Dtypes of a model.

    activations: dtype inside of the transformers, and of their matrices.
    outside: dtype of norms, embeddings of patches and positions, and of the projections around the transformers.
    rounded: weights of the transformers and the RoPE frequencies are rounded to bfloat16 first, as in the original,
        whose module-wide cast to bfloat16 catches the frequencies too (angles are off by up to 1 rad at position 800).
    """

    activations: torch.dtype
    outside: torch.dtype
    rounded: bool

    @property
    def name(self) -> str:
        """What its activations are commonly called."""
        return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[self.activations]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which the parameter `name` is held."""
        kept = not name.startswith(TRANSFORMERS) or name.startswith(_FLOAT32_INSIDE)
        kept = kept or (name.startswith(_GEMMAS) and "norm" in name)
        return self.outside if kept else self.activations

    def convert(self, name: str, value: Tensor) -> Tensor:
        """`value`, read from a checkpoint in any floating dtype, as the parameter `name` holds it."""
        if self.rounded and name.startswith(TRANSFORMERS):
            value = value.to(torch.bfloat16)
        return value.to(self.dtype_of(name))


BF16 = Precision(activations=torch.bfloat16, outside=torch.float32, rounded=True)
FP32 = Precision(activations=torch.float32, outside=torch.float32, rounded=False)
BF16_TRUTH = Precision(activations=torch.float32, outside=torch.float32, rounded=True)
"""The bf16 policy's weights and frequencies in float32 arithmetic: what a bf16 implementation approximates."""
FP32_TRUTH = Precision(activations=torch.float64, outside=torch.float64, rounded=False)
