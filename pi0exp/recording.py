"""Recorded observations: .npz files made by `experiments/observations/record_aloha.py`, found by name and checked.

N observations, H height, W width, A numbers of a state.
"""

import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pi0exp
from pi0exp.errors import UserError
from pi0exp.preprocess import ALOHA_STATE

_IMAGES, _STATES, _CAMERAS, _PROMPT = "image_N224x224x3", "state_N14", "camera_mask_3", "prompt"


@dataclass(frozen=True, eq=False)
class Recording:
    """images: uint8 [N, 224, 224, 3] of the top camera. states: floating [N, 14], as the robot sent them.

    cameras_present: of each slot of `CAMERAS`; only the first has pictures. label: the file's name and checksum.
    """

    images: np.ndarray
    states: np.ndarray
    cameras_present: tuple[bool, ...]
    prompt: str
    label: str


def find_observations(name: str) -> Path:
    """A path that exists, as it is given, else a recording of that name among those that come with the package."""
    folder = Path(pi0exp.__file__).parent / "experiments" / "observations"
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    there = ", ".join(path.name for path in sorted(folder.glob("*.npz"))) or "none"
    raise UserError(f"workload.observations is {name}, no such file; recordings that come with pi0exp: {there}")


def load_recording(path: Path) -> Recording:
    """Raises UserError naming the file and what is wrong in it: an array missing or not of the expected kind."""
    content = path.read_bytes()
    arrays = _arrays(path, content)
    images, states = _array(path, arrays, _IMAGES), _array(path, arrays, _STATES)
    cameras, prompt = _array(path, arrays, _CAMERAS), _array(path, arrays, _PROMPT)
    count = len(images) if images.ndim else 0
    _expect(path, _IMAGES, images, images.dtype == np.uint8, (max(count, 1), 224, 224, 3), "uint8")
    _expect(path, _STATES, states, np.issubdtype(states.dtype, np.floating), (count, ALOHA_STATE), "floating")
    _expect(path, _CAMERAS, cameras, cameras.dtype == np.bool_, (3,), "bool")
    _expect(path, _PROMPT, prompt, prompt.dtype.kind == "U", (), "str")
    if not np.isfinite(states).all():
        row, dim = np.argwhere(~np.isfinite(states))[0]
        raise UserError(f"{path}: {_STATES}[{row}, {dim}] is {states[row, dim]}; wanted finite numbers")
    if cameras.tolist() != [True, False, False]:
        raise UserError(f"{path}: {_CAMERAS} is {cameras.tolist()}, but there are pictures of the first camera only")
    return Recording(
        images=images,
        states=states,
        cameras_present=tuple(cameras.tolist()),
        prompt=str(prompt),
        label=f"{path.name} sha256:{hashlib.sha256(content).hexdigest()[:8]}",
    )


def _arrays(path: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        # A recording may come from anyone; unpickling it would run its code.
        file = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        members = {name: file[name] for name in file.files}
        return {name: member for name, member in members.items() if isinstance(member, np.ndarray)}
    # RuntimeError: zipfile takes a damaged header for encryption or an unknown method. MemoryError: a damaged shape.
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no readable .npz file: {reason}") from error


def _array(path: Path, arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key not in arrays:
        raise UserError(f"{path} lacks {key}; it has {', '.join(sorted(arrays)) or 'nothing'}")
    return arrays[key]


def _expect(path: Path, key: str, array: np.ndarray, right_dtype: bool, shape: tuple[int, ...], dtype: str) -> None:
    if not right_dtype or array.shape != shape:
        raise UserError(f"{path}: {key} is {array.dtype} {list(array.shape)}; wanted {dtype} {list(shape)}")
