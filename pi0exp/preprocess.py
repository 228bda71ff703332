"""From what a robot sends to what the model takes: pictures and states, on the host, in numpy.

H height, W width of a picture; A numbers of a state. Everything here works on one observation, without a batch axis.
The functions follow openpi's policy path, in its order: robot -> pi's convention -> normalised -> padded.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pi0exp.errors import UserError

ALOHA_STATE = 14
"""Per arm, left first: 6 joint angles (rad) and the opening of the gripper (0 closed, 1 open)."""

_ALOHA_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2)
_ALOHA_GRIPPERS = [6, 13]


def resize_with_pad(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Fit a picture into a black square, its aspect kept, centred. uint8 in, uint8 [size, size, 3] out.

    PIL's bilinear filter on uint8 (antialiased), as openpi's client does it: a resize in torch gives other pixels.
    A picture of the wanted size is returned as it is.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not image_HWC.size:
        raise UserError(f"picture is {image_HWC.dtype} {list(image_HWC.shape)}; wanted uint8 [height, width, 3]")
    height, width = image_HWC.shape[:2]
    if height == width == size:
        return image_HWC
    # Truncated, not rounded, and by way of the ratio: a side can come out one pixel short, as in the original.
    ratio = max(width / size, height / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    if not new_height or not new_width:
        raise UserError(f"picture of {height} x {width} pixels is too thin to be fitted into {size} x {size}")
    resized = Image.fromarray(image_HWC).resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    padded = np.zeros((size, size, 3), np.uint8)
    padded[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return padded


def adapt_to_pi(state_A: np.ndarray) -> np.ndarray:
    """An ALOHA state [14] in the convention of pi's own robots: flipped joints, gripper as an angle. float64 out.

    ALOHA reports how far a gripper's fingers are open; pi's robots report the angle of the motor that drives them
    through a horn of 22 mm and an arm of 36 mm. Constants: openpi's `aloha_policy`.
    """
    if state_A.shape != (ALOHA_STATE,):
        raise UserError(f"ALOHA state has the shape {list(state_A.shape)}; wanted [{ALOHA_STATE}]")
    adapted_A = _ALOHA_SIGNS * state_A.astype(np.float64)
    horn_m, arm_m = 0.022, 0.036
    opening_m = adapted_A[_ALOHA_GRIPPERS] * (0.05800 - 0.01844) + 0.01844
    sine = (horn_m**2 + opening_m**2 - arm_m**2) / (2 * horn_m * opening_m)
    angle_rad = np.arcsin(np.clip(sine, -1.0, 1.0))
    adapted_A[_ALOHA_GRIPPERS] = (angle_rad - 0.5476) / (1.6296 - 0.5476)
    return adapted_A


def pad_state(state_A: np.ndarray, dim: int) -> np.ndarray:
    """Zeros behind the state up to `dim` numbers."""
    if state_A.ndim != 1 or state_A.shape[0] > dim:
        raise UserError(
            f"state has the shape {list(state_A.shape)}; the model takes at most {dim} numbers (action_dim)"
        )
    return np.pad(state_A, (0, dim - state_A.shape[0]))


@dataclass(frozen=True)
class Normalization:
    """How a state is scaled before the model sees it: by mean/std (Pi0), by q01/q99 (Pi0.5), or not at all."""

    label: str = "identity"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    q01: tuple[float, ...] | None = None
    q99: tuple[float, ...] | None = None

    def apply(self, state_A: np.ndarray) -> np.ndarray:
        """float64 [A], not clipped. Statistics of more than A numbers are cut (openpi's rule), of fewer an error."""
        x: np.ndarray = state_A.astype(np.float64)
        if self.q01 is not None and self.q99 is not None:
            q01, q99 = self._cut(self.q01, x), self._cut(self.q99, x)
            x = (x - q01) / (q99 - q01 + 1e-6) * 2.0 - 1.0
        elif self.mean is not None and self.std is not None:
            x = (x - self._cut(self.mean, x)) / (self._cut(self.std, x) + 1e-6)
        return x

    def _cut(self, statistic: Sequence[float], x: np.ndarray) -> np.ndarray:
        if len(statistic) < x.shape[-1]:
            raise UserError(
                f"{self.label} has {len(statistic)} numbers for the state; this robot's state has {x.shape[-1]}"
            )
        return np.array(statistic[: x.shape[-1]])


def statistics_files(checkpoint: Path) -> list[Path]:
    """Each robot's, in a folder of its name, which can have slashes: physical-intelligence/libero."""
    return sorted((checkpoint / "assets").rglob("norm_stats.json"))


def load_normalization(directory: Path | str | None, pi05: bool) -> Normalization:
    """Statistics of the one `assets/**/norm_stats.json` below a checkpoint directory; identity where there are none.

    Raises UserError for a missing directory, several assets, a malformed file or one without what the model needs.
    """
    if directory is None:
        return Normalization()
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"checkpoint directory {root} is not there; it may hold assets/<name>/norm_stats.json")
    files = statistics_files(root)
    if not files:
        return Normalization()
    assets = [file.parent.relative_to(root).as_posix() for file in files]
    if len(files) > 1:
        raise UserError(
            f"checkpoint {root} has the statistics of several robots: {', '.join(assets)}; keep exactly one"
        )
    names = ("q01", "q99") if pi05 else ("mean", "std")
    state = _state_statistics(files[0])
    statistics = {name: _numbers(files[0], name, state.get(name)) for name in names}
    if len({len(numbers) for numbers in statistics.values()}) > 1:
        raise UserError(f"{files[0]}: norm_stats.state.{names[0]} and .{names[1]} differ in length")
    return Normalization(label=f"norm_stats of {assets[0]}", **statistics)


def _state_statistics(file: Path) -> dict[str, object]:
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    norm_stats = content.get("norm_stats") if isinstance(content, dict) else None
    state = norm_stats.get("state") if isinstance(norm_stats, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{file}: norm_stats.state is missing or no object")
    return state


def _numbers(file: Path, name: str, value: object) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    if not numbers or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise UserError(f"{file}: norm_stats.state.{name} is missing or no list of finite numbers")
    return tuple(float(number) for number in numbers)
