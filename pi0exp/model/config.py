"""The dimensions of Pi0. Everything else of the model follows from these numbers.

Pi0 is three transformers: SigLIP (vision), Gemma-2B ("paligemma", reads images and prompt) and a Gemma-300M (the
"action expert", turns noise into actions). The two Gemmas share the head geometry, which is what lets the expert
attend to paligemma's keys and values layer by layer.
"""

from dataclasses import dataclass

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The camera slots of Pi0, in the order in which their tokens stand in the prefix."""


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP: `depth` pre-norm blocks of `num_heads` heads over (image_size / patch_size)^2 patches."""

    width: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_dim: int = 4304
    image_size: int = 224
    patch_size: int = 14

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma stack; the head geometry is shared and stands in `ModelConfig`."""

    width: int
    depth: int
    mlp_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """Pi0 (`pi05=False`) or Pi0.5 (`pi05=True`: no state token, adaptive RMSNorm in the expert)."""

    pi05: bool = False
    vision: VisionConfig = VisionConfig()
    paligemma: GemmaConfig = GemmaConfig(width=2048, depth=18, mlp_dim=16384)
    expert: GemmaConfig = GemmaConfig(width=1024, depth=18, mlp_dim=4096)
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257152
    action_dim: int = 32
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    min_period: float = 4e-3
    max_period: float = 4.0

    def __post_init__(self) -> None:
        for name, value in self._positive():
            if value < 1:
                raise ValueError(f"model.{name} is {value}; it must be 1 or more")
        vision = self.vision
        if vision.image_size % vision.patch_size:
            raise ValueError(f"model.vision.image_size {vision.image_size} is no multiple of {vision.patch_size}")
        if vision.width % vision.num_heads:
            raise ValueError(f"model.vision.width {vision.width} is no multiple of {vision.num_heads} heads")
        if self.paligemma.depth != self.expert.depth:
            raise ValueError(
                f"model.paligemma.depth is {self.paligemma.depth} and model.expert.depth {self.expert.depth}; they must"
                " be equal, since expert layer i attends to the keys and values of paligemma layer i"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_heads {self.num_heads} is no multiple of {self.num_kv_heads} K/V heads")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim {self.head_dim} is odd; RoPE rotates pairs")
        if self.expert.width % 2 or self.expert.width < 4:
            raise ValueError(
                f"model.expert.width {self.expert.width} must be even and at least 4 (sine and cosine halves)"
            )

    def _positive(self) -> list[tuple[str, int]]:
        sizes = [(f"vision.{name}", value) for name, value in vars(self.vision).items()]
        sizes += [
            (f"{stack}.{name}", value)
            for stack in ("paligemma", "expert")
            for name, value in vars(getattr(self, stack)).items()
        ]
        return sizes + [
            (name, getattr(self, name))
            for name in ("num_heads", "num_kv_heads", "head_dim", "vocab_size", "action_dim")
        ]

    @property
    def suffix_prelude(self) -> int:
        """How many tokens stand before the actions in the suffix: Pi0's state token."""
        return 0 if self.pi05 else 1


def tiny(pi05: bool = False) -> ModelConfig:
    """The smallest model with every part of Pi0; runs on a CPU in a fraction of a second."""
    return ModelConfig(
        pi05=pi05,
        vision=VisionConfig(width=144, depth=2, num_heads=2, mlp_dim=96, image_size=56),
        paligemma=GemmaConfig(width=48, depth=3, mlp_dim=128),
        expert=GemmaConfig(width=32, depth=3, mlp_dim=96),
        head_dim=32,
        vocab_size=512,
    )
