"""What a policy is asked to do in a benchmark: a `Workload`, and the host arrays that it stands for.

B batch, L prompt tokens (padded), A action dim, S image size. Inputs depend on nothing but the workload's fields, the
dimensions of the model and the recording: two machines get the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pi0exp.errors import UserError
from pi0exp.model.config import CAMERAS, ModelConfig
from pi0exp.model.observation import Observation, observation_from_arrays
from pi0exp.preprocess import Normalization, adapt_to_pi, pad_state, resize_with_pad
from pi0exp.recording import Recording, find_observations, load_recording
from pi0exp.tokenizer import BOS, FIRST_WORD, PAD, Tokenizer, load_tokenizer, pad_tokens, prompt_tokens

_BLOCKS = 8  # a side of a synthetic picture


@dataclass(frozen=True)
class Workload:
    """The settings under `workload.`. Raises UserError naming the field whose value cannot be."""

    name: str = "default"
    batch_size: int = 1
    cameras_present: list[bool] = field(default_factory=lambda: [True, True, True])
    """In the order of `CAMERAS`."""
    prompt_tokens: int | None = 20
    """Real tokens of the prompt. None: as many as the recorded prompt has."""
    prompt_padded: int = 20
    """Tokens of the prompt with padding. A longer prompt is cut."""
    horizon: int = 10
    """Actions in a chunk."""
    num_steps: int = 10
    """Denoising steps."""
    seed: int = 0
    observations: str | None = None
    """A recording, by name or path. None: synthetic pictures, states and token ids."""
    tokenizer: str | None = None
    """PaliGemma's SentencePiece model. None: a stand-in that counts alike."""

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "prompt_padded": 0, "horizon": 1, "num_steps": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"workload.{name} is {getattr(self, name)}; it must be {least} or more")
        cameras = self.cameras_present
        if len(cameras) != len(CAMERAS) or not all(isinstance(present, bool) for present in cameras):
            raise UserError(
                f"workload.cameras_present is {cameras}; wanted true or false for each of {', '.join(CAMERAS)}"
            )
        tokens = self.prompt_tokens
        if self.observations is None and tokens is None:
            raise UserError("workload.prompt_tokens is null; without workload.observations it must be a number")
        if self.observations is None and self.tokenizer is not None:
            raise UserError(
                f"workload.tokenizer is {self.tokenizer}; only a recorded prompt (workload.observations) is tokenised"
            )
        if self.observations is not None and tokens is not None:
            raise UserError(
                f"workload.prompt_tokens is {tokens}; it must be null with workload.observations: the prompt decides"
            )
        if tokens is not None and not 0 <= tokens <= self.prompt_padded:
            raise UserError(
                f"workload.prompt_tokens is {tokens}; it must be 0 to {self.prompt_padded} (workload.prompt_padded)"
            )
        if not any(cameras) and (self.prompt_padded if tokens is None else tokens) == 0:
            raise UserError("workload.cameras_present has no camera and the prompt no token: nothing to attend to")


@dataclass(frozen=True, eq=False)
class HostInput:
    """Arrays of one call, ready to be copied to the device.

    images: camera -> uint8 [B, S, S, 3]. image_masks: camera -> bool [B]. state: float32 [B, A]. tokens: int64 [B, L].
    token_mask: bool [B, L]. noise: float32 [B, horizon, A].
    """

    images: dict[str, np.ndarray]
    image_masks: dict[str, np.ndarray]
    state: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    noise: np.ndarray

    def observation(self, config: ModelConfig, device: torch.device | str) -> Observation:
        return observation_from_arrays(
            self.images, self.image_masks, self.state, self.tokens, self.token_mask, config=config, device=device
        )


@dataclass(frozen=True, eq=False)
class Inputs:
    """`facts` say where tokens, normalization and observations are from; they belong into the record of a run."""

    items: list[HostInput]
    facts: dict[str, str]


@dataclass(frozen=True, eq=False)
class _Row:
    """One observation: pictures uint8 [S, S, 3] in the order of `CAMERAS`, state [A], token ids without padding."""

    pictures: tuple[np.ndarray, ...]
    state: np.ndarray
    ids: list[int]


def host_inputs(workload: Workload, config: ModelConfig, normalization: Normalization, count: int) -> Inputs:
    """`count` inputs, each with its own noise. Row b of input i is observation i * B + b, whatever `count` is.

    Synthetic observations are all different; their states are drawn as normalised ones, so `normalization` is left out.
    A recording starts again after its last observation. Raises UserError where workload, recording, tokenizer and
    model do not fit together.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")
    if workload.observations is None:
        facts = {"tokens": "stand-in", "normalization": "identity", "observations": "synthetic"}
        return Inputs(_items(workload, config, lambda k: _synthetic(workload, config, k), count), facts)

    recording = load_recording(find_observations(workload.observations))
    if tuple(workload.cameras_present) != recording.cameras_present:
        there = [name for name, present in zip(CAMERAS, recording.cameras_present, strict=True) if present]
        raise UserError(
            f"workload.cameras_present is {list(workload.cameras_present)}; in {workload.observations} it is"
            f" {list(recording.cameras_present)}: {', '.join(there)} present"
        )
    tokenizer = load_tokenizer(workload.tokenizer, config.vocab_size)
    rows = _recorded(recording, tokenizer, config, normalization)
    facts = {"tokens": tokenizer.label, "normalization": normalization.label, "observations": recording.label}
    if (longest := max(len(row.ids) for row in rows)) > workload.prompt_padded:
        facts["prompt"] = f"cut from {longest} to {workload.prompt_padded} tokens"
    return Inputs(_items(workload, config, lambda k: rows[k % len(rows)], count), facts)


def _items(workload: Workload, config: ModelConfig, row: Callable[[int], _Row], count: int) -> list[HostInput]:
    batch = workload.batch_size
    return [_batched(workload, config, row, range(i * batch, (i + 1) * batch)) for i in range(count)]


def _batched(workload: Workload, config: ModelConfig, row: Callable[[int], _Row], numbers: range) -> HostInput:
    rows = [row(k) for k in numbers]
    prompts = [pad_tokens(each.ids, workload.prompt_padded) for each in rows]
    chunk = (workload.horizon, config.action_dim)
    return HostInput(
        images={name: np.stack([each.pictures[slot] for each in rows]) for slot, name in enumerate(CAMERAS)},
        image_masks={
            name: np.full(len(rows), there) for name, there in zip(CAMERAS, workload.cameras_present, strict=True)
        },
        state=np.stack([each.state for each in rows]).astype(np.float32),
        tokens=np.stack([tokens for tokens, _ in prompts]),
        token_mask=np.stack([mask for _, mask in prompts]),
        noise=np.stack([_generator(workload, "noise", k).standard_normal(chunk, np.float32) for k in numbers]),
    )


def _generator(workload: Workload, use: str, k: int) -> np.random.Generator:
    """One for each observation and use: a row does not depend on how many were made before it."""
    return np.random.default_rng([workload.seed, ("observation", "noise").index(use), k])


def _synthetic(workload: Workload, config: ModelConfig, k: int) -> _Row:
    random = _generator(workload, "observation", k)
    # An absent camera gets a picture like the others: with a black one, a forgotten mask would show less.
    pictures = tuple(_picture(random, config.vision.image_size) for _ in CAMERAS)
    state_A = random.standard_normal(config.action_dim)
    words = random.integers(FIRST_WORD, config.vocab_size, workload.prompt_tokens or 0).tolist()
    return _Row(pictures, state_A, [BOS, *words[1:]] if words else [])


def _picture(random: np.random.Generator, size: int) -> np.ndarray:
    """Coarse blocks of colour under fine noise: differs within patches and between them, as a photograph does."""
    edge = -(-size // _BLOCKS)
    blocks = random.integers(0, 256, (_BLOCKS, _BLOCKS, 3), np.int16).repeat(edge, 0).repeat(edge, 1)[:size, :size]
    noisy: np.ndarray = np.clip(blocks + random.integers(-24, 25, (size, size, 3), np.int16), 0, 255)
    return noisy.astype(np.uint8)


def _recorded(
    recording: Recording, tokenizer: Tokenizer, config: ModelConfig, normalization: Normalization
) -> list[_Row]:
    size = config.vision.image_size
    black = np.zeros((size, size, 3), np.uint8)  # what the original sends for a camera that a robot lacks
    rows = []
    for image, state in zip(recording.images, recording.states, strict=True):
        state_A = normalization.apply(adapt_to_pi(state))
        ids = prompt_tokens(tokenizer, recording.prompt, state_A, config.pi05)
        pictures = (resize_with_pad(image, size), black, black)
        rows.append(_Row(pictures, pad_state(state_A, config.action_dim), ids))
    return rows


KINDS = ("given", "padded", "absent", "both")
"""Of the inputs of a verification, a quarter each, in this order."""


def verification_inputs(
    workload: Workload, config: ModelConfig, normalization: Normalization, count: int = 8
) -> list[HostInput]:
    """Inputs on which an option has to give the reference's actions, whatever the workload looks like.

    A quarter each, see KINDS: as the workload has them; with padding behind the prompt; with an absent camera; both.
    A workload whose prompt is padded or that lacks a camera already stays so. In the last a batch of several rows has
    prompts of different lengths.
    """
    items, part = host_inputs(workload, config, normalization, count).items, count // len(KINDS)
    return [
        *items[:part],
        *(_with_padding(item, mixed=False) for item in items[part : 2 * part]),
        *(_without_camera(item) for item in items[2 * part : 3 * part]),
        *(_without_camera(_with_padding(item, mixed=True)) for item in items[3 * part :]),
    ]


def _with_padding(item: HostInput, mixed: bool) -> HostInput:
    """The prompt of each row cut to three fifths, in every second row not at all if `mixed`; always 1 token or more."""
    batch, padded = item.tokens.shape
    width = padded if padded >= 2 else 4
    tokens_BL = np.full((batch, width), PAD, np.int64)
    lengths_B = np.zeros(batch, np.int64)
    for row in range(batch):
        real = item.tokens[row][item.token_mask[row]].tolist() or [BOS]
        if mixed and row % 2:
            kept = real if len(real) >= 2 else [*real, FIRST_WORD]
        else:
            kept = real[: max(1, len(real) * 3 // 5)]
        tokens_BL[row, : len(kept)] = kept
        lengths_B[row] = len(kept)
    return replace(item, tokens=tokens_BL, token_mask=np.arange(width)[None] < lengths_B[:, None])


def _without_camera(item: HostInput) -> HostInput:
    """The last camera but one masked in all rows, its picture left as it is."""
    if not all(mask.all() for mask in item.image_masks.values()):
        return item
    name = CAMERAS[-2]
    return replace(item, image_masks=item.image_masks | {name: np.zeros_like(item.image_masks[name])})
