"""A model and its numbers: built empty, then filled parameter by parameter from a checkpoint or with random draws."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pi0exp.model.checkpoint import Checkpoint
from pi0exp.model.config import ModelConfig
from pi0exp.model.pi0 import Pi0
from pi0exp.model.precision import Precision

Source = Callable[[str, tuple[int, ...]], Tensor]
"""(parameter name, shape) -> its values in any floating dtype, on the device of the model."""


def build(config: ModelConfig, precision: Precision, source: Source, device: torch.device | str) -> Pi0:
    """The model on `device`, for inference, with the parameters that `source` gives, held as `precision` says.

    Beyond the model itself, one parameter at a time is in memory. Raises what `source` raises.
    """
    with torch.device("meta"):
        model = Pi0(config, precision)
    fill(model, precision, source)
    model.rope.to(device)
    kind = torch.device(device).type
    assert all(tensor.device.type == kind for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()


def fill(model: nn.Module, precision: Precision, source: Source) -> None:
    """Put the values that `source` gives in the place of the parameters of a model, or of a part of one."""
    for name, empty in list(model.named_parameters()):
        value = precision.convert(name, source(name, tuple(empty.shape)))
        assert value.shape == empty.shape, f"{name} is {list(value.shape)}, not {list(empty.shape)}"
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def checkpoint_source(checkpoint: Checkpoint, device: torch.device | str) -> Source:
    """The parameters of `checkpoint`, which `checkpoint.check(config)` has found to fit."""
    return lambda name, shape: checkpoint.read(name, device)


def random_source(config: ModelConfig, seed: int, device: torch.device | str) -> Source:
    """Random parameters of a model that behaves like a trained one where it matters to speed and accuracy.

    Attention logits have a standard deviation of 2 to 3 in each stack at any dimensions and depth, so attention picks
    tokens: with an untrained model's uniform attention, wrong masks and positions would hardly move the actions.
    Residual streams stay of order one. Each parameter is float32, drawn on `device` from a generator of its own, so
    its values depend on `seed`, its name, its shape and the kind of device, but not on the order of the calls.
    """

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        mean, std = _spread(name, shape, config)
        value.mul_(std).add_(mean)
        if name.endswith("norm1.dense.bias") or name.endswith("norm2.dense.bias"):
            value[-shape[0] // 3 :] += 1.0  # The gates: a branch whose gate is near zero would test nothing.
        return value

    return draw


# Gain of a matrix: the root mean square of its result where that of its input is one, the inputs being independent.
# Where the input is smaller (behind a GELU, a SiLU, an average of values) the gain makes up for it.
_GAINS = {
    # The product of the gains of q and k is the standard deviation of the logits if tokens had nothing in common.
    "vision.attention.q": 1.7,
    "vision.attention.k": 1.7,
    "attention.q": 1.6,
    "attention.k": 1.6,
    "attention.v": 1.0,
    "attention.out": 2.0,  # Values of different tokens are averaged.
    "mlp.fc1": 1.0,
    "mlp.fc2": 1.5,  # Behind a GELU.
    "mlp.gate": 1.0,
    "mlp.up": 1.0,
    "mlp.down": 1.5,
    "patch": 0.8,  # Less than the positions, so that the patches of an empty background differ too.
    "projector": 1.0,
    "dense": 0.4,  # adaRMS: scale, shift and gate move by about 0.25 with time, whose embedding is behind a SiLU.
    "action_in_proj": 1.0,
    "state_proj": 1.0,
    "action_out_proj": 1.5,
    "time_mlp_in": 1.4,  # A sine and a cosine.
    "time_mlp_out": 1.7,  # Behind a SiLU.
    "action_time_mlp_in": 1.2,
    "action_time_mlp_out": 1.7,
}


def _spread(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of the parameter."""
    stack, *path, leaf = name.split(".")
    vision = stack == "vision"
    if name == "vision.position":
        return 0.0, 0.8
    if name == "embedding.weight":
        return 0.0, config.paligemma.width**-0.5  # The model multiplies by the root of the width.
    if leaf == "bias":
        return 0.0, 0.05
    if path and path[-1].startswith("norm"):
        return (1.0 if vision else 0.0), 0.1  # Gemma's weight is an offset from one.
    if path and path[-1] == "dense":
        kind = "dense"
    elif "blocks" in path:
        kind = ".".join(path[-2:])
    else:
        kind = path[-1] if path else stack
    gain = _GAINS.get(f"{stack}.{kind}") or _GAINS[kind]
    if path and path[-1] in ("out", "fc2", "down"):
        # A block adds two branches to the residual stream; all of them together shall weigh as much as its input.
        depth = config.vision.depth if vision else config.paligemma.depth  # The expert is as deep as paligemma.
        gain /= math.sqrt(2 * depth)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))
