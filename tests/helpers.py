"""What several tests share: composed configurations, tiny policies and observations for them.

Shapes: B batch, L prompt tokens, C action horizon, A action dim.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hydra import compose as hydra_compose
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pi0exp import build, compose
from pi0exp.config import Stack
from pi0exp.config import option as typed_option
from pi0exp.config import stack as typed_stack
from pi0exp.machine import Machine
from pi0exp.model.config import CAMERAS, ModelConfig, tiny
from pi0exp.model.observation import Observation, observation_from_arrays
from pi0exp.model.precision import FP32, Precision
from pi0exp.model.weights import build as build_model
from pi0exp.model.weights import random_source
from pi0exp.option import Option
from pi0exp.policy import Policy
from pi0exp.policy_subject import PolicyInstance, PolicySubject

CPU = torch.device("cpu")
GROUPS_OF = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(compose.CONF.iterdir())
    if folder.is_dir() and folder.name != "hydra"
}
"""Folder of `conf/` -> the names in it."""

# Tensors this small are fastest on one thread.
torch.set_num_threads(1)


def composed(*overrides: str) -> tuple[DictConfig, DictConfig]:
    """Our part and Hydra's part of what these words of the command line compose to."""
    compose.register()
    with compose.initialize_config_dir(str(compose.CONF), version_base="1.3", job_name="pi0exp"):
        cfg = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), cfg.hydra


def plain_config(*overrides: str) -> dict[str, Any]:
    """What the program gets for these words of the command line: the composed configuration as a plain dict."""
    return deepcopy(_plain(*overrides))


@cache
def _plain(*overrides: str) -> dict[str, Any]:
    return compose.from_words(overrides)


def subject_of(*overrides: str) -> PolicySubject:
    return PolicySubject.from_plain(plain_config(*overrides))


def with_option(subject: PolicySubject, **options: Option) -> PolicySubject:
    """The subject with other options in its stack: group=option."""
    return replace(subject, stack=replace(subject.stack, **options))


def lacking(group: str, name: str) -> list[str]:
    """Why a CPU cannot run an option in the plain stack."""
    with compose.session():
        option = typed_option(group, compose.option_node(group, name))
    return build.unmet(replace(plain_stack(), **{group: option}), Machine())


@cache
def plain_stack() -> Stack:
    return typed_stack(plain_config())


_TRUTHS: dict[str, list[Tensor]] = {}


def truth_once(
    subject: PolicySubject, checks: Any, device: torch.device, compute: Any = PolicySubject.truth
) -> list[Tensor]:
    """`PolicySubject.truth`, which is the same for all stacks of a precision."""
    given = (subject.dimensions, subject.weights, subject.workload, subject.observations, subject.precision.truth)
    if repr(given) not in _TRUTHS:
        _TRUTHS[repr(given)] = compute(subject, checks, device)
    return _TRUTHS[repr(given)]


def built(subject: PolicySubject) -> PolicyInstance:
    """Built and verified on the CPU."""
    with patch.object(PolicySubject, "truth", truth_once):
        return subject.build(CPU, 1, lambda text: None)


def tiny_policy(pi05: bool = False, precision: Precision = FP32, horizon: int = 10, num_steps: int = 3) -> Policy:
    """A plain policy with random weights, on the CPU."""
    config = tiny(pi05)
    return Policy(build_model(config, precision, random_source(config, 0, CPU), CPU), horizon, num_steps)


def tiny_observation(
    cameras: Sequence[Sequence[bool | int]] = ((1, 1, 1),),
    lengths: Sequence[int] = (5,),
    padded: int = 8,
    seed: int = 0,
    config: ModelConfig | None = None,
) -> Observation:
    """An observation with one row for each entry of `cameras` (which are there) and `lengths` (of the prompt)."""
    config, random = config or tiny(), np.random.default_rng(seed)
    batch, size = len(lengths), config.vision.image_size
    return observation_from_arrays(
        {name: random.integers(0, 256, (batch, size, size, 3), np.uint8) for name in CAMERAS},
        {name: np.array([bool(row[slot]) for row in cameras]) for slot, name in enumerate(CAMERAS)},
        random.standard_normal((batch, config.action_dim)),
        random.integers(2, config.vocab_size, (batch, padded)),
        np.arange(padded)[None] < np.array(lengths)[:, None],
        config=config,
        device=CPU,
    )


def noise_for(policy: Policy, observation: Observation, seed: int = 0) -> Tensor:
    """Noise [B, C, A] on the host."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(observation.batch_size, policy.horizon, policy.model.config.action_dim, generator=generator)


COMPILE = torch.compile


def traced(function: Any, options: Any = None, **rest: Any) -> Any:
    """For torch.compile: no code is generated."""
    return COMPILE(function, backend="eager", **rest)


class PretendedGraph:
    """Stands in for pi0exp.graphs.capture.Graph, which needs a GPU.

    Runs again at each replay and writes what comes out over what came out first, as a graph does.
    """

    nodes, kernels, replay_us = 5, 4, 2.5

    def __init__(self, run: Callable[[], Any], warmup: int, note: Callable[[str], None]) -> None:
        self.run = run
        for _ in range(warmup):
            run()
        self.output = run()
        # Memory of its own, even where the function returns what it was given.
        self.tensors = [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)]

    def replay(self) -> None:
        made = [leaf for leaf in tree_leaves(self.run()) if isinstance(leaf, Tensor)]
        for static, new in zip(self.tensors, made, strict=True):
            static.copy_(new)


def captured(option: Option, pi05: bool = False) -> Policy:
    """A plain policy with an option of the group graphs."""
    policy = tiny_policy(pi05)
    policy.begin("graphs")
    option.apply(policy)
    return policy


def structures() -> list[Observation]:
    """Observations of three structures, two of the first."""
    return [
        tiny_observation([(1, 1, 1)], [8], seed=1),
        tiny_observation([(1, 1, 1)], [8], seed=2),
        tiny_observation([(1, 0, 1)], [5], seed=3),
        tiny_observation([(1, 1, 1), (0, 0, 1)], [8, 3], seed=4),
    ]
