"""The policy: the model and the call that is timed, changed only through the methods below, each of which says so.

A call has two parts. `prepare` turns an observation into the one that is computed (drops absent cameras, say) by what
the host knows. The device part then runs on it and depends on nothing but its `structure`; this is what
`torch.compile` traces and graphs capture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pi0exp.errors import UserError
from pi0exp.model.observation import Observation
from pi0exp.model.pi0 import Pi0

Prepare = Callable[[Observation], Observation]
DeviceCall = Callable[[Observation, Tensor], Tensor]
Counters = Callable[[], dict[str, float]]

Attachments = Callable[[], dict[str, str]]
Watch = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""(stage, function that computes a part of it) -> a function that computes the same."""


@runtime_checkable
class FromHost(Protocol):
    """A device part that also knows a faster way than to copy tensor by tensor: `from_host`, host to host."""

    def __call__(self, observation: Observation, noise_BCA: Tensor) -> Tensor: ...
    def from_host(self, observation: Observation, noise_BCA: Tensor) -> Tensor: ...


STAGE_METHODS = {"vision": ("embed_prefix",), "prefill": ("prefill",), "denoise": ("begin", "denoise_step")}
"""The methods of `Pi0` that compute a stage."""


@dataclass
class Policy:
    """A model, how it is called, and what was done to it.

    horizon, num_steps: size of the action chunk and number of Euler steps. applied: group -> what its option did.
    stages_apart: each call runs the functions of the stages from Python; false in one graph for the whole call.
    closed: stage -> the switch that computes all of it, so that options for all stages leave it alone. shared: what
    options of single stages have in common, under a name of theirs.
    """

    model: Pi0
    horizon: int
    num_steps: int = 10
    applied: dict[str, list[str]] = field(default_factory=dict)
    stages_apart: bool = True
    closed: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    _prepare: list[Prepare] = field(default_factory=list)
    _call: DeviceCall | None = None
    _from_host: DeviceCall | None = None
    _counters: list[Counters] = field(default_factory=list)
    _attachments: list[Attachments] = field(default_factory=list)
    _group: str = ""

    @property
    def device(self) -> torch.device:
        return self.model.rope.inv_freq.device

    @torch.inference_mode()
    def sample_actions(self, observation: Observation, noise_BCA: Tensor | None = None) -> Tensor:
        """Actions for an observation: float32 [B, horizon, action_dim], normalised as the model was trained.

        noise_BCA: float32 of that shape on the policy's device; None draws it from torch's generator.
        Raises UserError where noise or observation are not of the policy's shape, dtype or device.
        """
        if observation.device != self.device:
            raise UserError(
                f"the observation is on {observation.device}, the policy on {self.device}: use observation.to(...)"
            )
        observation, noise_BCA = self._prepared(observation, noise_BCA)
        return (self._call or self.plain_call)(observation, noise_BCA)

    @torch.inference_mode()
    def act(self, observation: Observation, noise_BCA: Tensor | None = None) -> Tensor:
        """From an observation on the host to actions there, as a robot calls it; returns when they are there.

        The same actions as those of `sample_actions`. What the options leave out, such as an absent camera, is not
        copied. Raises UserError as it does.
        """
        if observation.device.type != "cpu":
            raise UserError(f"the observation is on {observation.device}; `act` takes one on the host")
        observation, noise_BCA = self._prepared(observation, noise_BCA)
        if self._from_host is not None:
            return self._from_host(observation, noise_BCA)
        call = self._call or self.plain_call
        return call(observation.to(self.device), noise_BCA.to(self.device)).cpu()

    def _prepared(self, observation: Observation, noise_BCA: Tensor | None) -> tuple[Observation, Tensor]:
        """Checked, and as the options want it; noise drawn where there is none."""
        size, action_dim, device = self.model.config.vision.image_size, self.model.config.action_dim, observation.device
        shape = (observation.batch_size, self.horizon, action_dim)
        if noise_BCA is None:
            noise_BCA = torch.randn(shape, device=device)
        if tuple(noise_BCA.shape) != shape or noise_BCA.dtype != torch.float32 or noise_BCA.device != device:
            raise UserError(
                f"noise is {noise_BCA.dtype} {list(noise_BCA.shape)} on {noise_BCA.device};"
                f" wanted torch.float32 {list(shape)} on {device}"
            )
        for name, found in zip(observation.images, observation.image_sizes, strict=True):
            if found != (size, size):
                raise UserError(f"observation.images[{name}] is {list(found)}; the model takes {[size, size]}")
        if tuple(observation.state_BA.shape[1:]) != (action_dim,):
            raise UserError(
                f"observation.state_BA is {list(observation.state_BA.shape)}; the model takes [batch, {action_dim}]"
            )
        for prepare in self._prepare:
            observation = prepare(observation)
        return observation, noise_BCA

    @property
    def staged(self) -> bool:
        """Whether `act` has a way of its own from the host to the device."""
        return self._from_host is not None

    def plain_call(self, observation: Observation, noise_BCA: Tensor) -> Tensor:
        """The device part as the model itself has it."""
        return self.model.sample_actions(observation, noise_BCA, self.num_steps)

    def counters(self) -> dict[str, float]:
        """What the options counted so far: captures, replays, recompilations."""
        return {name: value for counters in self._counters for name, value in counters().items()}

    def attachments(self) -> dict[str, str]:
        """File name -> text that the options want kept with the result, such as a tuned table."""
        return {name: text for attachments in self._attachments for name, text in attachments().items()}

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Meanwhile each function that computes a stage is `watch(stage, function)`, outermost, so that nothing is
        captured or compiled anew. Only where the stages are apart."""
        inner, own = vars(self.model), dict[str, Any]()
        names = [(stage, name) for stage, methods in self.stage_methods.items() for name in methods]
        for stage, name in names:
            if name in inner:
                own[name] = inner[name]
            inner[name] = watch(stage, getattr(self.model, name))
        try:
            yield
        finally:
            for _, name in names:
                del inner[name]
            inner.update(own)

    # ---- how options change it

    def begin(self, group: str) -> None:
        """What follows is done by the option of `group`."""
        self._group = group

    def note(self, line: str) -> None:
        self.applied.setdefault(self._group, []).append(line)

    def stage_modules(self, stage: str) -> list[nn.Module]:
        """The modules of a stage. The projections around the expert belong to `denoise`, the embedding to `vision`."""
        model = self.model
        if stage == "vision":
            return [model.vision, model.embedding]
        if stage == "prefill":
            return [model.paligemma]
        inside = {"vision", "embedding", "paligemma", "rope"}
        return [module for name, module in model.named_children() if name not in inside]

    def fill(self, kind: type[nn.Module], slot: str, function: Any, stages: tuple[str, ...], what: str) -> None:
        """Set the slot of every instance of `kind` in `stages` to `function`; raises if a stage has none."""
        self.fill_each(kind, slot, lambda module: function, stages, what)

    def fill_each(
        self,
        kind: type[nn.Module],
        slot: str,
        factory: Callable[[Any], Any],
        stages: tuple[str, ...],
        what: str,
    ) -> None:
        """The same with a function for each module: `factory(module)`, or None to leave that module as it is."""
        counts: Counter[str] = Counter()
        for stage in stages:
            for module in self.instances(kind, stage):
                if not hasattr(module, slot):
                    raise AttributeError(f"{type(module).__name__} has no slot {slot!r}")
                if (function := factory(module)) is not None:
                    setattr(module, slot, function)
                    counts[stage] += 1
        for stage in stages:
            if not counts[stage]:
                raise LookupError(f"{self._group}: {what} found no {kind.__name__}.{slot} to fill in {stage}")
            self.note(f"{stage}: {counts[stage]} {kind.__name__}.{slot} -> {what}")

    def fill_model(self, slot: str, function: Any, what: str) -> None:
        """Set a slot of the model itself."""
        if not hasattr(self.model, slot):
            raise AttributeError(f"{type(self.model).__name__} has no slot {slot!r}")
        setattr(self.model, slot, function)
        self.note(f"Pi0.{slot} -> {what}")

    def instances(self, kind: type[nn.Module], stage: str) -> list[Any]:
        """All modules of `kind` in a stage."""
        return [m for root in self.stage_modules(stage) for m in root.modules() if isinstance(m, kind)]

    def wrap_stage(self, stage: str, wrapper: Callable[[Any], Any], what: str) -> None:
        """Replace each function that computes a stage by `wrapper` of it."""
        for name in self.stage_methods[stage]:
            setattr(self.model, name, wrapper(getattr(self.model, name)))
            self.note(f"{stage}: Pi0.{name} -> {what}")

    @property
    def stage_methods(self) -> Mapping[str, tuple[str, ...]]:
        """Stage -> the methods of the model that compute it."""
        return STAGE_METHODS

    def blocks(self, stage: str) -> list[Any]:
        """The transformer blocks of a stage."""
        stacks = {"vision": self.model.vision, "prefill": self.model.paligemma, "denoise": self.model.expert}
        return list(stacks[stage].get_submodule("blocks").children())

    def wrap_blocks(self, stage: str, wrapper: Callable[[Any], Any], what: str) -> None:
        """Replace the forward of each transformer block of a stage; blocks of one class share one wrapped function.

        wrapper: (function of the block and its arguments) -> a function that computes the same.
        """
        blocks = self.blocks(stage)
        wrapped = {kind: wrapper(kind.forward) for kind in dict.fromkeys(type(block) for block in blocks)}
        for block in blocks:
            block.forward = partial(wrapped[type(block)], block)
        self.note(f"{stage}: {len(blocks)} blocks -> {what}")

    def wrap_call(self, wrapper: Callable[[DeviceCall], DeviceCall], what: str, whole: bool = False) -> None:
        """Replace the device part of a call by `wrapper` of it, which may be `FromHost`.

        whole: the result no longer passes through the functions of the stages, a captured graph say.
        """
        self._call = wrapper(self._call or self.plain_call)
        # Found once: to ask it of a call takes as long as a few of its tensors.
        self._from_host = self._call.from_host if isinstance(self._call, FromHost) else None
        self.stages_apart = self.stages_apart and not whole
        self.note(f"sample_actions -> {what}")

    def prepare_with(self, prepare: Prepare, what: str) -> None:
        """Pass every observation through `prepare` before the device part."""
        self._prepare.append(prepare)
        self.note(f"observation -> {what}")

    def attach_with(self, attachments: Attachments) -> None:
        """Keep these texts with the result, asked for when everything was measured."""
        self._attachments.append(attachments)

    def count_with(self, counters: Counters) -> None:
        """Report these counters in the result, of a wrong one too: their names are none of pi0exp.result.TIMED."""
        self._counters.append(counters)
