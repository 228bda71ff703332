"""One observation of a robot as the model takes it: tensors on the device, and beside them what the host knows.

Shapes: B batch, H height, W width, L prompt tokens (padded), A state and action dim.

The host facts (which cameras are present, how long each prompt is) are read from the host arrays before these are
copied to the device. Options decide on them without asking the device, so no call waits for the GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0exp.errors import UserError
from pi0exp.model.config import CAMERAS, ModelConfig


@dataclass(frozen=True)
class Structure:
    """All that an option may know of an observation when it decides what to run, hence the key of captured graphs.

    `cameras` says of each camera slot whether it is present in `all`, `some` or `none` of the rows. `scaled`: pictures
    are numbers of the model's range already, no bytes.
    """

    batch_size: int
    cameras: tuple[tuple[str, str], ...]
    prompt_padded: int
    prompt_full: bool
    scaled: bool

    @property
    def full(self) -> bool:
        """Every prefix token of every row is real: nothing has to be masked."""
        return self.prompt_full and all(presence == "all" for _, presence in self.cameras)


@dataclass(frozen=True, eq=False)
class Observation:
    """Device tensors and host facts of B observations. `observation_from_arrays` makes one from numpy arrays.

    images: camera name -> uint8 [B, H, W, 3] as cameras send them, or all of them float32 [B, 3, H, W] in [-1, 1]; in
    the order of `CAMERAS`; some may be left out. The call scales bytes on the device (`scaled`).
    camera_masks: camera name -> bool [B]; False where the camera does not exist (its picture is then meaningless).
    state_BA: float32 [B, action_dim]. prompt_BL: int64 [B, L], real tokens first. prompt_mask_BL: bool [B, L].
    cameras_present, prompt_lengths: the same facts on the host.
    Raises UserError where shapes, dtypes or devices do not fit together.
    """

    images: Mapping[str, Tensor]
    camera_masks: Mapping[str, Tensor]
    state_BA: Tensor
    prompt_BL: Tensor
    prompt_mask_BL: Tensor
    cameras_present: Mapping[str, tuple[bool, ...]]
    prompt_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        batch = self.batch_size
        names = tuple(self.images)
        if names != tuple(name for name in CAMERAS if name in names):
            raise UserError(
                f"observation.images has the cameras {', '.join(names)}; known, in this order: {', '.join(CAMERAS)}"
            )
        if not names == tuple(self.camera_masks) == tuple(self.cameras_present):
            raise UserError("observation.images, .camera_masks and .cameras_present name different cameras")
        device, padded = self.device, self.prompt_padded
        picture, shape = (torch.float32, (batch, 3)) if self.scaled else (torch.uint8, (batch,))
        behind = () if self.scaled else (3,)
        wanted: list[tuple[str, str, Tensor, torch.dtype, tuple[int, ...]]] = [
            ("state_BA", "", self.state_BA, torch.float32, (batch, *self.state_BA.shape[1:])),
            ("prompt_BL", "", self.prompt_BL, torch.int64, (batch, padded)),
            ("prompt_mask_BL", "", self.prompt_mask_BL, torch.bool, (batch, padded)),
        ]
        for name, size in zip(names, self.image_sizes, strict=True):
            wanted.append(("images", name, self.images[name], picture, (*shape, *size, *behind)))
            wanted.append(("camera_masks", name, self.camera_masks[name], torch.bool, (batch,)))
        for what, name, tensor, dtype, form in wanted:
            if tensor.dtype != dtype or tensor.shape != form or tensor.device != device:
                raise UserError(
                    f"observation.{what}{name and f'[{name}]'} is {tensor.dtype} {list(tensor.shape)}"
                    f" on {tensor.device}; wanted {dtype} {list(form)} on {device}"
                )
        if any(len(present) != batch for present in self.cameras_present.values()) or len(self.prompt_lengths) != batch:
            raise UserError(f"observation's host facts are not of {batch} rows, the size of its batch")
        for row, length in enumerate(self.prompt_lengths):
            if not 0 <= length <= self.prompt_padded:
                raise UserError(
                    f"observation.prompt_lengths[{row}] is {length}; the prompt has {self.prompt_padded} tokens"
                )
        self.refuse_empty()

    def refuse_empty(self) -> None:
        """Raises UserError for a row with nothing in it."""
        for row, length in enumerate(self.prompt_lengths):
            if length == 0 and not any(present[row] for present in self.cameras_present.values()):
                raise UserError(
                    f"observation row {row} has neither a camera nor a prompt token: there is nothing to attend to"
                )

    @classmethod
    def of_fitting(cls, **values: Any) -> "Observation":
        """Of values that are known to fit together, as those of another observation are: nothing is checked.

        A check takes 20 us, and there are several observations on the way of a call from the host.
        """
        made = object.__new__(cls)
        made.__dict__.update(values)
        return made

    def _with(self, **changes: Any) -> "Observation":
        """As `dataclasses.replace`, for changes that leave everything fitting."""
        return self.of_fitting(**{field.name: getattr(self, field.name) for field in fields(self)} | changes)

    @property
    def batch_size(self) -> int:
        return self.state_BA.shape[0]

    @cached_property
    def scaled(self) -> bool:
        """Whether no picture is bytes any more."""
        return not any(image.dtype == torch.uint8 for image in self.images.values())

    @property
    def image_sizes(self) -> list[tuple[int, ...]]:
        """Height and width of the pictures of each camera."""
        sides = slice(2, None) if self.scaled else slice(1, 3)
        return [tuple(image.shape[sides]) for image in self.images.values()]

    @property
    def prompt_padded(self) -> int:
        return self.prompt_BL.shape[1] if self.prompt_BL.ndim == 2 else -1

    @property
    def device(self) -> torch.device:
        return self.state_BA.device

    @cached_property
    def structure(self) -> Structure:
        def presence(rows: tuple[bool, ...]) -> str:
            return "all" if all(rows) else "some" if any(rows) else "none"

        return Structure(
            batch_size=self.batch_size,
            cameras=tuple((name, presence(rows)) for name, rows in self.cameras_present.items()),
            prompt_padded=self.prompt_padded,
            prompt_full=all(length == self.prompt_padded for length in self.prompt_lengths),
            scaled=self.scaled,
        )

    def tensors(self) -> list[Tensor]:
        """All device tensors in a fixed order; two observations of one `structure` have the same shapes here."""
        return [*self.images.values(), *self.camera_masks.values(), self.state_BA, self.prompt_BL, self.prompt_mask_BL]

    def with_tensors(self, tensors: list[Tensor]) -> "Observation":
        """The same observation over other tensors, in the order of `tensors()`."""
        cameras = len(self.images)
        return replace(
            self,
            images=dict(zip(self.images, tensors[:cameras], strict=True)),
            camera_masks=dict(zip(self.images, tensors[cameras : 2 * cameras], strict=True)),
            state_BA=tensors[-3],
            prompt_BL=tensors[-2],
            prompt_mask_BL=tensors[-1],
        )

    def only_cameras(self, keep: list[str]) -> "Observation":
        """The same observation without the cameras that are not in `keep`."""
        return self._with(
            images={name: self.images[name] for name in keep},
            camera_masks={name: self.camera_masks[name] for name in keep},
            cameras_present={name: self.cameras_present[name] for name in keep},
        )

    def only_prompt(self, tokens: int) -> "Observation":
        """The same observation with the first `tokens` columns of the prompt; the others may hold padding only."""
        if tokens == self.prompt_padded:
            return self
        assert max(self.prompt_lengths) <= tokens < self.prompt_padded
        return self._with(prompt_BL=self.prompt_BL[:, :tokens], prompt_mask_BL=self.prompt_mask_BL[:, :tokens])

    def to(self, device: torch.device | str) -> "Observation":
        return self.with_tensors([tensor.to(device) for tensor in self.tensors()])


def observation_from_arrays(
    images: Mapping[str, np.ndarray],
    image_masks: Mapping[str, np.ndarray],
    state: np.ndarray,
    tokens: np.ndarray,
    token_mask: np.ndarray,
    *,
    config: ModelConfig,
    device: torch.device | str,
) -> Observation:
    """Check host arrays and copy them to the device; on the CPU the observation shares their memory where it can.

    images: camera name -> uint8 [B, H, W, 3] of the model's image size (see `preprocess.resize_with_pad`).
    All of `CAMERAS` must be there; an absent camera has any picture and a False in `image_masks`. A camera without an
    entry in `image_masks` is present. state: floating [B, action_dim]. tokens: integer [B, L]; token_mask: bool [B, L],
    True for real tokens, which stand first. Raises UserError that names what does not fit.
    """
    state = _array("state", state)
    if state.ndim != 2 or state.shape[1] != config.action_dim or state.dtype.kind != "f":
        raise UserError(
            f"observation state is {state.dtype} {list(state.shape)}; wanted floating [batch, {config.action_dim}]"
        )
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which is told
        narrow = state.astype(np.float32)
    if not np.isfinite(narrow).all():
        row, dim = np.argwhere(~np.isfinite(narrow))[0]
        raise UserError(f"observation state[{row}, {dim}] is {state[row, dim]}; the state must be finite in float32")
    batch = state.shape[0]
    if batch < 1:
        raise UserError("observation state has no rows; a batch has 1 or more")

    if unknown := [name for name in (*images, *image_masks) if name not in CAMERAS]:
        raise UserError(f"observation has an unknown camera {unknown[0]!r}; known: {', '.join(CAMERAS)}")
    size = config.vision.image_size
    present: dict[str, np.ndarray] = {}
    for name in CAMERAS:
        if name not in images:
            raise UserError(
                f"observation images lack {name!r}; an absent camera has a picture too, and False in image_masks"
            )
        image = _array(f"images[{name}]", images[name])
        if image.dtype != np.uint8 or image.shape != (batch, size, size, 3):
            found, wanted = f"{image.dtype} {list(image.shape)}", f"uint8 {[batch, size, size, 3]}"
            raise UserError(f"observation images[{name}] is {found}; wanted {wanted}")
        mask = _array(f"image_masks[{name}]", image_masks[name]) if name in image_masks else np.ones(batch, bool)
        if mask.dtype != np.bool_ or mask.shape != (batch,):
            raise UserError(
                f"observation image_masks[{name}] is {mask.dtype} {list(mask.shape)}; wanted bool [{batch}]"
            )
        present[name] = mask

    tokens, token_mask = _array("tokens", tokens), _array("token_mask", token_mask)
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.dtype.kind not in "iu":
        raise UserError(f"observation tokens is {tokens.dtype} {list(tokens.shape)}; wanted integer [{batch}, length]")
    if token_mask.dtype != np.bool_ or token_mask.shape != tokens.shape:
        raise UserError(
            f"observation token_mask is {token_mask.dtype} {list(token_mask.shape)}; wanted bool {list(tokens.shape)}"
        )
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < config.vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= config.vocab_size)][0]
        raise UserError(f"observation token {bad} is outside of the vocabulary of {config.vocab_size} tokens")
    if (token_mask[:, 1:] > token_mask[:, :-1]).any():
        raise UserError("observation token_mask is not a run of True followed by False: padding stands at the right")

    on_host = torch.device(device).type == "cpu"

    def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        array = np.ascontiguousarray(array)
        if any(stride < 0 for stride in array.strides):  # of an axis of one, which numpy calls contiguous
            array = array.copy()
        tensor = torch.from_numpy(array)
        return tensor if on_host and tensor.dtype == dtype else tensor.to(device, dtype)

    made = Observation.of_fitting(
        images={name: put(images[name], torch.uint8) for name in CAMERAS},
        camera_masks={name: put(mask, torch.bool) for name, mask in present.items()},
        state_BA=put(narrow, torch.float32),
        prompt_BL=put(tokens.astype(np.int64, copy=False), torch.int64),
        prompt_mask_BL=put(token_mask, torch.bool),
        cameras_present={name: tuple(mask.tolist()) for name, mask in present.items()},
        prompt_lengths=tuple(token_mask.sum(axis=1).tolist()),
    )
    made.refuse_empty()
    return made


def scaled(image: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], in the original's order of operations.

    What is scaled already is returned as it is.
    """
    if image.dtype != torch.uint8:
        return image
    return scaled_values(image.permute(0, 3, 1, 2).contiguous().float())


def scaled_values(values: Tensor) -> Tensor:
    """Values of bytes from 0 to 255, in a floating dtype, as values in [-1, 1]."""
    return (values / 255.0) * 2.0 - 1.0


def _array(name: str, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise UserError(f"observation {name} is a {type(value).__name__}; wanted a numpy array")
    return value
