"""Some layers of PaliGemma's decoder, the blocks of the policy's own model, reading a prefix.

Shapes: B batch, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from pi0exp.config import subject_settings
from pi0exp.errors import UserError
from pi0exp.model.config import ModelConfig
from pi0exp.model.gemma import Gemma, LayerCache
from pi0exp.model.layers import Rope
from pi0exp.model.mask import prefix_mask
from pi0exp.model.pi0 import no_cache, prefix_positions
from pi0exp.model.precision import Precision
from pi0exp.model.weights import Source, checkpoint_source, fill, random_source
from pi0exp.policy_subject import PolicySubject
from pi0exp.roofline import VALUE_BYTES, StageSum
from pi0exp.subject import StageWork
from pi0exp.subjects.measured import PartSubject
from pi0exp.subjects.part import Given, PartPolicy

STAGE = "prefill"
"""The stage as which options find the layers."""


class Layers(nn.Module):
    """The first layers of PaliGemma's decoder and its final norm.

    Slot `empty_cache`, as in `Pi0`: (model, tokens) -> what keys and values are written to, or None.
    """

    empty_cache: Callable[[Any, Tensor], list[LayerCache] | None] = staticmethod(no_cache)

    def __init__(self, config: ModelConfig, precision: Precision):
        super().__init__()
        self.config, self.precision = config, precision
        self.paligemma = Gemma(config.paligemma, config, adaptive=False)
        self.rope = Rope(config.head_dim, config.rope_theta, precision.rounded)

    def prefill(self, x_BTD: Tensor, valid_BT: Tensor) -> tuple[Tensor, list[LayerCache]]:
        """The normed tokens [B, T, D], and keys and values of every layer. All tokens are real."""
        rotation = self.rope(prefix_positions(valid_BT), x_BTD.dtype)
        past, mask = self.empty_cache(self, x_BTD), prefix_mask(valid_BT, True)
        made: tuple[Tensor, list[LayerCache]] = self.paligemma(x_BTD, rotation, mask, past, None)
        return made

    def forward(self, given: Given, x_BTD: Tensor) -> Tensor:
        """The tokens [B, T, D]."""
        return self.prefill(x_BTD, given.valid_BT)[0]  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayersConfig:
    """`subject.` of layers. depth: how many. rows: tokens of a sequence; null: real ones of the workload's prefix."""

    depth: int = 4
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}; it must be 1 or more")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it must be 1 or more, or null for those of the workload's prefix")


@dataclass(frozen=True)
class LayersSubject(PartSubject):
    """`config.depth` layers on tokens that are all real."""

    config: LayersConfig

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(PolicySubject.from_plain(plain), subject_settings(plain, LayersConfig)).checked()

    def checked(self) -> Self:
        """Raises UserError where a checkpoint does not have so many layers."""
        there = self.whole.dimensions.paligemma.depth
        if self.whole.weights.checkpoint is not None and self.config.depth > there:
            raise UserError(f"subject.depth is {self.config.depth}; the checkpoint has {there} layers")
        return self

    @cached_property
    def rows(self) -> int:
        if self.config.rows is not None:
            return self.config.rows
        workload = self.whole.workload
        real = self.whole.inputs(1).items[0].token_mask.sum(axis=1)
        return sum(workload.cameras_present) * self.whole.dimensions.vision.num_patches + int(real.max())

    @property
    def dimensions(self) -> ModelConfig:
        """Of a model that has only so many layers; random weights depend on the depth."""
        whole, depth = self.whole.dimensions, self.config.depth
        gemmas = {name: replace(getattr(whole, name), depth=depth) for name in ("paligemma", "expert")}
        return replace(whole, **gemmas)

    def shape(self) -> tuple[int, int, int]:
        return self.whole.workload.batch_size, self.rows, self.whole.dimensions.paligemma.width

    def params(self) -> dict[str, str]:
        return {
            "subject.depth": str(self.config.depth),
            "subject.rows": str(self.rows),
            "workload.batch_size": str(self.whole.workload.batch_size),
        }

    def given(self, device: torch.device) -> Given:
        return Given(torch.ones(self.shape()[:2], dtype=torch.bool, device=device))

    def part(self, precision: Precision, device: torch.device) -> PartPolicy:
        with torch.device("meta"):
            model = Layers(self.dimensions, precision)
        fill(model, precision, self._source(device))
        model.rope.to(device)
        what = f"{self.config.depth} layers of PaliGemma's decoder"
        return PartPolicy(
            model.eval(), 0, 1, what=what, on=device, present={STAGE: [model.paligemma]}, slots=("empty_cache",)
        )

    def _source(self, device: torch.device) -> Source:
        if device.type == "meta":
            return lambda name, shape: torch.empty(shape, device="meta")
        if self.whole.checkpoint is not None:
            return checkpoint_source(self.whole.checkpoint, device)
        return random_source(self.dimensions, self.whole.weights.seed, device)

    def work(self) -> list[StageWork]:
        """Every product, the attention of all tokens to all, weights once, tokens in and out, keys and values out."""
        config, depth = self.whole.dimensions, self.config.depth
        gemma, query = config.paligemma, config.num_heads * config.head_dim
        key_value = config.num_kv_heads * config.head_dim
        batch, tokens, width = self.shape()
        rows, made = batch * tokens, StageSum(VALUE_BYTES[self.matrix_rate()])
        made.gemm(rows, query + 2 * key_value, width, times=depth)
        made.attention(batch * tokens**2, query, depth)
        made.gemm(rows, width, query, times=depth)
        made.gemm(rows, 2 * gemma.mlp_dim, width, times=depth)
        made.gemm(rows, width, gemma.mlp_dim, times=depth)
        made.values += 2 * rows * width + depth * rows * 2 * key_value
        return [made.work(STAGE)]
