"""Which weights and operations become one: switches, of which `none`, `projections`, `kernels` and `blocks` are named
sets.

`fusion.rewrites` says things of the model more cheaply; see `pi0exp.fusion.rewrites`. The checkpoint's format stays as
it is: weights are merged from the plain model's when the stack is applied.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from pi0exp.fusion import blocks, kernels, projections, vision
from pi0exp.fusion.rewrites import Rewrites
from pi0exp.machine import Machine
from pi0exp.option import ANY_GPU, HOPPER, Numerics, Option, Requires
from pi0exp.policy import Policy

if TYPE_CHECKING:
    from pi0exp.config import Stack

NVIDIA = Requires(vendors=("nvidia",))


@dataclass(frozen=True)
class Fusion(Option):
    """Fused projections and kernels, and exact rewrites.

    qkv: queries, keys and values by one matrix. gate_up: both halves of Gemma's MLP by one. norms: RMSNorm, adaptive
    RMSNorm and LayerNorm as one Triton kernel together with the residual sum before them. activation: the gated
    activation as one Triton kernel. rope: split, rotation and the write into the cache as one Triton kernel. blocks:
    the denoising step as a chain of hand-fused Triton kernels, five a layer. persistent: with blocks, all layers of a
    step in one launch, whose programs meet after each phase (at most 16 rows of one observation, on sm_90; the expert's
    weights are kept a second time, in the order of its reads). ring: with persistent, those weights flow through a ring
    in shared memory, ahead of the phases and across their meetings (bf16). wide: with ring, so do those of a step of 17
    to 64 rows, a horizon of 50, in a kernel of its own. gelu_epilogue: vision's first product, its
    bias and GELU in one launch of cuBLASLt. patches: bytes of pictures become tokens in one Triton kernel; no GPU has
    run it yet.
    """

    qkv: bool = False
    gate_up: bool = False
    norms: bool = False
    activation: bool = False
    rope: bool = False
    blocks: bool = False
    persistent: bool = False
    ring: bool = False
    wide: bool = False
    gelu_epilogue: bool = False
    patches: bool = False
    rewrites: Rewrites = field(default_factory=Rewrites)

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        """EXACT where nothing is switched on; merged products and fused roundings come in another order."""
        return Numerics.REORDERED if self.chosen() else Numerics.EXACT

    @property
    def idle(self) -> bool:
        return not self.chosen()

    def chosen(self) -> list[str]:
        """The switches that are on."""
        own = [one.name for one in fields(self) if getattr(self, one.name) is True]
        return own + [f"rewrites.{name}" for name in self.rewrites.chosen()]

    def unmet(self, machine: Machine) -> list[str]:
        triton = [name for name in kernels.SWITCHES if getattr(self, name)]
        reasons = [f"{vision.EPILOGUE} {reason}" for reason in NVIDIA.unmet(machine)] if self.gelu_epilogue else []
        if self.persistent:
            return reasons + [f"persistent {reason}" for reason in HOPPER.unmet(machine)]
        if triton:
            reasons += [f"{reason} (for {', '.join(triton)})" for reason in ANY_GPU.unmet(machine)]
        return reasons

    def proofs(self) -> list[str]:
        proofs = [pattern for name, pattern in kernels.SWITCHES.items() if getattr(self, name)]
        return proofs + ([vision.PROOF] if self.gelu_epilogue else [])

    def clashes(self, stack: "Stack") -> list[str]:
        if self.persistent and not self.blocks:
            return ["persistent needs fusion.blocks"]
        if self.ring and not self.persistent:
            return ["ring needs fusion.persistent"]
        if self.wide and not self.ring:
            return ["wide needs fusion.ring"]
        reasons = self.rewrites.clashes(stack) + (vision.clashes(stack) if self.gelu_epilogue else [])
        return reasons + (blocks.clashes(self, stack) if self.blocks else [])

    def apply(self, policy: Policy) -> None:
        # Rewrites first: they cut plain matrices, which are merged afterwards. Where one matrix makes queries, keys and
        # values one operation stores them; Triton's kernels write to two places.
        self.rewrites.apply(policy, queries_in_room=self.qkv and not (self.rope or self.blocks))
        if self.qkv:
            projections.merge_qkv(policy)
        if self.gate_up:
            projections.merge_gate_up(policy)
        if self.norms:
            kernels.fill_norms(policy)
        if self.activation:
            kernels.fill_activation(policy)
        if self.rope:
            kernels.fill_rope(policy)
        if self.gelu_epilogue:
            vision.gelu_epilogue(policy)
        if self.patches:
            vision.patches_by_kernel(policy)
        if self.blocks:
            blocks.fill_blocks(policy, self)
