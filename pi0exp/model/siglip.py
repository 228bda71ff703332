"""The vision tower: SigLIP So400m/14, pre-norm blocks with biases, no class token, no pooling.

Shapes: B pictures, P patches, D width, N heads, H head dim.
"""

from collections.abc import Callable

from torch import Tensor, empty, nn

from pi0exp.model.config import VisionConfig
from pi0exp.model.layers import Attention, Linear, gelu


class VisionAttention(Attention):
    """Every patch attends to every patch of its own picture; no mask, no positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, config.width)
        self.v = Linear(config.width, config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        q_BPNH, k_BPNH, v_BPNH = (f(x_BPD).unflatten(-1, (self.num_heads, -1)) for f in (self.q, self.k, self.v))
        out: Tensor = self.out(self.attend(q_BPNH, k_BPNH, v_BPNH, None).flatten(2))
        return out


class VisionMlp(nn.Module):
    """fc2(gelu(fc1(x))). Slot `activate`: (hidden) -> same shape."""

    activate: Callable[[Tensor], Tensor] = staticmethod(gelu)

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activate(self.fc1(x_BPD)))
        return out


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps)
        self.attention = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps)
        self.mlp = VisionMlp(config)

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self.attention(self.norm1(x_BPD))
        out: Tensor = x_BPD + self.mlp(self.norm2(x_BPD))
        return out


class Siglip(nn.Module):
    """Pictures to prefix tokens: patches, blocks, final norm, projection to paligemma's width."""

    def __init__(self, config: VisionConfig, out_width: int, eps: float):
        super().__init__()
        self.patch = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position = nn.Parameter(empty(config.num_patches, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config, eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps)
        self.projector = Linear(config.width, out_width)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] -> [B, P, out_width] in the activations' dtype, patches row by row."""
        x_BPD = self.patch(image_BCHW.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2) + self.position
        x_BPD = x_BPD.to(self.projector.weight.dtype)
        for block in self.blocks:
            x_BPD = block(x_BPD)
        out: Tensor = self.projector(self.norm(x_BPD))
        return out
