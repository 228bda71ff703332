"""Checkpoints of Pi0 as openpi and lerobot write them: found, checked before anything is read, read tensor by tensor.

A checkpoint is a directory with `model.safetensors`. Nothing pickled is ever opened. Every way in which a file can be
wrong raises a `UserError` of one line that names the file and, where there is one, the tensor.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pi0exp.errors import UserError
from pi0exp.model.config import ModelConfig
from pi0exp.model.names import EMBEDDING, EMBEDDING_ALIAS, UNUSED_HEAD, openpi_name, parameter_shapes
from pi0exp.model.pi0 import Pi0

Layout = Literal["openpi", "lerobot"]
"""lerobot's files have openpi's names behind `model.`; those on its hub pages may have openpi's layout all the same."""
WEIGHTS = "model.safetensors"
_PREFIX: dict[Layout, str] = {"openpi": "", "lerobot": "model."}
_FLOATS = ("F64", "F32", "F16", "BF16")
_DOWNLOADED = ["*.safetensors", "*.json"]  # Nothing pickled even comes onto the disk.
_LARGEST_HEADER = 100_000_000  # bytes; safetensors itself refuses longer ones


def find_checkpoint(name: str) -> Path:
    """Where the checkpoint `name` is: what `Checkpoint` takes.

    name: a directory with model.safetensors; a .safetensors file; or `org/name` or `org/name@revision` on the Hugging
    Face hub, which is downloaded into its cache unless a path of that name exists. Returns the directory, or the file
    where that is not called model.safetensors. Raises UserError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _with_weights(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"checkpoint {path} is no .safetensors file: give one, or a directory with {WEIGHTS}")
        return path.parent if path.name == WEIGHTS else path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name):
        return _with_weights(_download(name))
    raise UserError(
        f"checkpoint {name!r} does not exist: give a directory with {WEIGHTS}, a .safetensors file or a hub id org/name"
    )


def _with_weights(directory: Path) -> Path:
    if (directory / WEIGHTS).is_file():
        return directory
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise UserError(f"checkpoint {directory} cannot be read: {error.strerror or error}") from error
    there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"
    raise UserError(
        f"checkpoint {directory} has no {WEIGHTS} (there is {there}): give the directory that holds it;"
        " a JAX (orbax) checkpoint must first be converted with openpi's convert_jax_model_to_pytorch.py"
    )


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"checkpoint {name!r} is no local path, and to get it from the hub: pip install 'pi0exp[hub]'"
        ) from None
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_DOWNLOADED))
    except Exception as error:  # The hub's client raises its own, its transport's and the system's errors.
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {name!r} is no local path, and could not be had from the hub: {cause}") from error


class Checkpoint:
    """An open weights file: its header is checked, its tensors stay on disk (memory-mapped) until they are read.

    path: a directory with model.safetensors, or a .safetensors file. Raises UserError.
    directory: where the file lies. layout: how its tensors are named. pi05: whether it holds Pi0.5 rather than Pi0.
    """

    def __init__(self, path: Path | str):
        path = Path(path)
        self.file = path if path.is_file() else _with_weights(path) / WEIGHTS
        self.directory = self.file.parent
        self._shapes = _read_header(self.file)
        self.layout: Layout = "lerobot" if any(key.startswith("model.") for key in self._shapes) else "openpi"
        self.pi05 = self._detect_pi05()
        try:
            self._open: Any = safe_open(str(self.file), framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.file} is corrupt: {_one_line(error)}; get it again") from error

    def _detect_pi05(self) -> bool:
        old = ".paligemma.language_model."
        if key := next((key for key in self._shapes if old in key), None):
            raise UserError(
                f"{self.file} has the names of lerobot's first pi0 port (tensor {key}), which are not supported:"
                " use a checkpoint saved by openpi or by lerobot 0.4 or later"
            )
        is_pi0 = self._key("state_proj.weight") in self._shapes
        is_pi05 = self._key("time_mlp_in.weight") in self._shapes
        is_pi05 |= any(".input_layernorm.dense." in key for key in self._shapes)
        if is_pi0 == is_pi05:
            has = "both" if is_pi0 else "neither"
            join = "and" if is_pi0 else "nor"
            raise UserError(
                f"{self.file} holds {has} state_proj.weight (of pi0) {join} time_mlp_in.weight (of pi05):"
                " it is no checkpoint of either"
            )
        return is_pi05

    def _key(self, ours: str) -> str:
        """The parameter's name in this file."""
        prefix = _PREFIX[self.layout]
        if ours == "embedding.weight" and prefix + EMBEDDING_ALIAS in self._shapes:
            return prefix + EMBEDDING_ALIAS
        return prefix + openpi_name(ours)

    def check(self, config: ModelConfig) -> None:
        """Raise UserError unless the file holds exactly the tensors of this model; reads none of them."""
        held, wanted = ("pi05" if pi05 else "pi0" for pi05 in (self.pi05, config.pi05))
        if held != wanted:
            raise UserError(f"{self.file} holds {held}, the model is {wanted}: use model={held}")
        shapes = {self._key(ours): shape for ours, shape in parameter_shapes(config).items()}
        known = {_PREFIX[self.layout] + name for name in (EMBEDDING, EMBEDDING_ALIAS, UNUSED_HEAD)}
        faults = []
        if missing := [key for key in shapes if key not in self._shapes]:
            faults.append(f"lacks the tensor {_first(missing)}")
        if unknown := [key for key in self._shapes if key not in shapes and key not in known]:
            faults.append(f"holds the tensor {_first(unknown)}, which the model has not")
        if faults:
            raise UserError(f"{self.file} {' and '.join(faults)}: give a whole {held} checkpoint of the model's depth")
        if wrong := [key for key, shape in shapes.items() if self._shapes[key] != shape]:
            found, want = list(self._shapes[wrong[0]]), list(shapes[wrong[0]])
            raise UserError(
                f"{self.file} has a tensor {_first(wrong)} of shape {found}; the model wants {want}:"
                " give a checkpoint of the model's dimensions"
            )

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """The parameter `name` (ours) in the file's dtype, on `device`; a copy, which outlives the file."""
        key = self._key(name)
        if key not in self._shapes:
            raise UserError(f"{self.file} lacks the tensor {key}: it is no whole checkpoint of this model")
        try:
            value: Tensor = self._open.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.file}: the tensor {key} cannot be read: {_one_line(error)}") from error
        return value.to(device, copy=True)


def _first(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} (and {len(keys) - 1} more)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the file. Says what safetensors does not: which tensor a cut-off file ends in."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            text = stream.read(length) if length <= _LARGEST_HEADER else b""
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if start == b"version ":
        raise UserError(f"{file} is only a pointer of git-lfs: fetch the weights themselves with `git lfs pull`")
    if len(start) < 8 or len(text) < length <= _LARGEST_HEADER:
        raise UserError(
            f"{file} is truncated: its {size} bytes end in the header, before the first tensor; get it again"
        )
    damaged = f"{file} is corrupt or no safetensors file (anything pickled is refused): its header"
    if length > _LARGEST_HEADER:
        raise UserError(f"{damaged} would be {length} bytes long; get it again")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        spans = sorted((int(entry["data_offsets"][1]), str(key)) for key, entry in entries.items())
        shapes = {str(key): tuple(int(n) for n in entry["shape"]) for key, entry in entries.items()}
        dtypes = {str(key): str(entry["dtype"]) for key, entry in entries.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{damaged} cannot be understood ({type(error).__name__}); get it again") from error
    for end, key in spans:
        if end > size - 8 - length:
            missing = spans[-1][0] - (size - 8 - length)
            raise UserError(
                f"{file} is truncated: the tensor {key} lies beyond its end, {missing} bytes are missing; get it again"
            )
    for key, dtype in dtypes.items():
        if dtype not in _FLOATS:
            raise UserError(f"{file} has a tensor {key} of dtype {dtype}; weights must be one of {', '.join(_FLOATS)}")
    return shapes


def save(model: Pi0, directory: Path | str, layout: Layout = "openpi", dtype: torch.dtype | None = None) -> None:
    """Write the parameters as openpi's or lerobot's strict loader wants them: `directory`/model.safetensors.

    dtype: of all tensors in the file; None keeps each parameter's own, which makes the round trip bit-equal.
    openpi's layout has a config.json beside it, which says what the file holds and which no loader needs.
    Raises UserError where the directory cannot be written.
    """
    directory, prefix = Path(directory), _PREFIX[layout]
    tensors = {
        prefix + openpi_name(ours): value.detach().to("cpu", dtype).contiguous()
        for ours, value in model.named_parameters()
    }
    embedding = tensors[prefix + EMBEDDING]
    tensors[prefix + UNUSED_HEAD] = embedding.new_zeros(embedding.shape[0], model.config.expert.width)
    metadata = {"format": "pt"}
    if layout == "openpi":
        metadata[EMBEDDING_ALIAS] = EMBEDDING
    else:
        tensors[prefix + EMBEDDING_ALIAS] = embedding.clone()
    # Renamed when complete: a model that still reads the old file keeps it, and nobody finds half a file.
    partial = directory / f"{WEIGHTS}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        partial.replace(directory / WEIGHTS)
        if layout == "openpi":
            dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
            about = {"action_dim": model.config.action_dim, "pi05": model.config.pi05, "precision": "+".join(dtypes)}
            (directory / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {directory} cannot be written: {_one_line(error)}") from error
