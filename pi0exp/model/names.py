"""What our parameters are called in openpi's checkpoints, and what shapes they have."""

import torch

from pi0exp.model.config import ModelConfig
from pi0exp.model.pi0 import Pi0
from pi0exp.model.precision import FP32

_PALIGEMMA = "paligemma_with_expert.paligemma"
EMBEDDING = f"{_PALIGEMMA}.lm_head.weight"
"""openpi ties the embedding to PaliGemma's output head, and its files keep the table under the head's name."""
EMBEDDING_ALIAS = f"{_PALIGEMMA}.model.language_model.embed_tokens.weight"
"""The other name of the tied table; lerobot does not tie, and its files hold both."""
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
"""The expert's output head [vocabulary, expert width]: random numbers that nothing reads but strict loaders ask for."""

_VISION_PARTS = {
    "patch": "embeddings.patch_embedding",
    "position": "embeddings.position_embedding.weight",
    "norm": "post_layernorm",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention": "self_attn",
    **{part: f"{part}_proj" for part in ("q", "k", "v", "out")},
}
_GEMMA_PARTS = {
    "blocks": "layers",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attention": "self_attn",
    "out": "o_proj",
    **{part: f"{part}_proj" for part in ("q", "k", "v", "gate", "up", "down")},
}
_STACKS = {
    "vision": (f"{_PALIGEMMA}.model.vision_tower.vision_model", _VISION_PARTS),
    "paligemma": (f"{_PALIGEMMA}.model.language_model", _GEMMA_PARTS),
    "expert": ("paligemma_with_expert.gemma_expert.model", _GEMMA_PARTS),
}


def openpi_name(ours: str) -> str:
    """`vision.blocks.0.norm1.bias` -> `(...).vision_model.encoder.layers.0.layer_norm1.bias`, and so on.

    `ours` is a name of `Pi0.named_parameters()`; the projections around the transformers have the same name in both.
    """
    if ours == "embedding.weight":
        return EMBEDDING
    if ours.startswith("vision.projector."):
        return ours.replace("vision.projector", f"{_PALIGEMMA}.model.multi_modal_projector.linear")
    stack, _, rest = ours.partition(".")
    if stack not in _STACKS:
        return ours
    prefix, parts = _STACKS[stack]
    return ".".join([prefix, *(parts.get(part, part) for part in rest.split("."))])


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `Pi0`, under our names; allocates nothing."""
    with torch.device("meta"):
        model = Pi0(config, FP32)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
