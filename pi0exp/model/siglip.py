"""The vision tower: SigLIP So400m/14, pre-norm blocks with biases, no class token, no pooling.

Shapes: B pictures, P patches, D width, N heads, H head dim.
"""

from collections.abc import Callable

from torch import Tensor, empty, nn

from pi0exp.model.config import VisionConfig
from pi0exp.model.layers import Attention, Branch, JoinFn, LayerNorm, Linear, gelu, plain_join
from pi0exp.model.observation import scaled


def plain_project(attention: "VisionAttention", x_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [B, P, N, H]."""
    q, k, v = (linear(x_BPD) for linear in (attention.q, attention.k, attention.v))
    heads = (-1, attention.head_dim)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


class VisionAttention(Attention):
    """Every patch attends to every patch of its own picture; no mask, no positions. Up to the output matrix.

    Slot `project`: (attention, x) -> queries, keys, values.
    """

    project: Callable[["VisionAttention", Tensor], tuple[Tensor, Tensor, Tensor]] = staticmethod(plain_project)
    qkv: Linear  # in the place of q, k and v where they are merged

    def __init__(self, config: VisionConfig):
        super().__init__(config.width // config.num_heads)
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, config.width)
        self.v = Linear(config.width, config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        q_BPNH, k_BPNH, v_BPNH = self.project(self, x_BPD)
        return self.attend(q_BPNH, k_BPNH, v_BPNH, None, self.scale).flatten(2)


def plain_hidden(mlp: "VisionMlp", x_BPD: Tensor) -> Tensor:
    """gelu(fc1(x)), [B, P, F]."""
    return mlp.activate(mlp.fc1(x_BPD))


class VisionMlp(nn.Module):
    """fc2(gelu(fc1(x))), of which fc2 is left to the block.

    Slots `activate`: (hidden) -> same shape; `hidden`: (mlp, x) -> what goes into fc2.
    """

    activate: Callable[[Tensor], Tensor] = staticmethod(gelu)
    hidden: Callable[["VisionMlp", Tensor], Tensor] = staticmethod(plain_hidden)

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        return self.hidden(self, x_BPD)


class VisionBlock(nn.Module):
    """Attention and MLP, each behind a norm that adds the branch before it. Slot `join`, as in `GemmaBlock`."""

    join: JoinFn = staticmethod(plain_join)

    def __init__(self, config: VisionConfig, eps: float):
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps)
        self.attention = VisionAttention(config)
        self.norm2 = LayerNorm(config.width, eps)
        self.mlp = VisionMlp(config)

    def forward(self, x_BPD: Tensor, branch: Branch | None) -> tuple[Tensor, Branch | None]:
        """The residual stream and the branch that is still to be added to it."""
        x_BPD, normed_BPD = self.norm1(x_BPD, branch)
        x_BPD, branch = self.join(self.attention.out, self.attention(normed_BPD), x_BPD, None)
        x_BPD, normed_BPD = self.norm2(x_BPD, branch)
        return self.join(self.mlp.fc2, self.mlp(normed_BPD), x_BPD, None)


def plain_patches(vision: "Siglip", image: Tensor) -> Tensor:
    """A convolution without overlap, and positions: [B, P, D]."""
    return placed(vision, vision.patch(scaled(image).to(vision.patch.weight.dtype)).flatten(2).transpose(1, 2))


def placed(vision: "Siglip", patches_BPD: Tensor) -> Tensor:
    """With positions and in the activations' dtype.

    The patches come out of the convolution channel by channel; row by row, or every layer would keep that layout.
    """
    placed_BPD: Tensor = (patches_BPD + vision.position).to(vision.norm.weight.dtype).contiguous()
    return placed_BPD


class Siglip(nn.Module):
    """Pictures to prefix tokens: patches, blocks, final norm, projection to paligemma's width.

    Slot `embed_patches`: (vision, pictures as an observation has them) -> tokens with positions, [B, P, D].
    """

    embed_patches: Callable[["Siglip", Tensor], Tensor] = staticmethod(plain_patches)

    def __init__(self, config: VisionConfig, out_width: int, eps: float):
        super().__init__()
        self.patch = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position = nn.Parameter(empty(config.num_patches, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config, eps) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, eps)
        self.projector = Linear(config.width, out_width)

    def forward(self, image: Tensor) -> Tensor:
        """Pictures as an observation has them -> [B, P, out_width] in the activations' dtype, patches row by row."""
        x_BPD = self.embed_patches(self, image)
        branch: Branch | None = None
        for block in self.blocks:
            x_BPD, branch = block(x_BPD, branch)
        _, normed_BPD = self.norm(x_BPD, branch)
        out: Tensor = self.projector(normed_BPD)
        return out
