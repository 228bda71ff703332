"""Checkpoints: names and shapes, round trips, and every way in which a file can be wrong."""

import json
import pickle
import shutil
import sys
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0exp.errors import UserError
from pi0exp.model.checkpoint import Checkpoint, find_checkpoint, save
from pi0exp.model.config import CAMERAS, ModelConfig, tiny
from pi0exp.model.names import EMBEDDING, EMBEDDING_ALIAS, UNUSED_HEAD, openpi_name, parameter_shapes
from pi0exp.model.observation import observation_from_arrays
from pi0exp.model.pi0 import Pi0
from pi0exp.model.precision import BF16, FP32, Precision
from pi0exp.model.weights import build, checkpoint_source, random_source

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
PATCH = openpi_name("vision.patch.weight")
KINDS = pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])


def tiny_model(pi05: bool, precision: Precision = FP32, seed: int = 0) -> Pi0:
    config = tiny(pi05)
    return build(config, precision, random_source(config, seed, "cpu"), "cpu")


def golden_checkpoint(directory: Path, pi05: bool = False) -> Path:
    """The golden weights as a checkpoint directory, whose file may be spoilt."""
    shutil.copy(GOLDEN / "weights" / f"tiny_{'pi05' if pi05 else 'pi0'}.safetensors", directory / "model.safetensors")
    return directory


def edit(directory: Path, **changes: Tensor | None) -> Path:
    """Rewrite the weights with some tensors replaced, added or (None) left out."""
    tensors = load_file(directory / "model.safetensors") | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, directory / "model.safetensors")
    return directory


def refusal(directory: Path, pi05: bool = False) -> str:
    """The one line with which opening or checking the checkpoint is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        Checkpoint(directory).check(tiny(pi05))
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


# ---- names and shapes


@KINDS
def test_names_shapes_and_dtypes_are_openpis(pi05: bool) -> None:
    rows = [
        line.split("\t") for line in (DATA / f"openpi_{'pi05' if pi05 else 'pi0'}_keys.tsv").read_text().splitlines()
    ]
    listed = {key: (shape, dtype, int(numel)) for key, shape, dtype, numel in rows[1:]}
    ours = {
        openpi_name(name): ("x".join(map(str, shape)), str(BF16.dtype_of(name)).removeprefix("torch."), prod(shape))
        for name, shape in parameter_shapes(ModelConfig(pi05=pi05)).items()
    }
    assert listed.pop(UNUSED_HEAD)[0] == "257152x1024"
    assert ours == listed


# ---- reading what openpi wrote


@KINDS
def test_golden_weights_give_the_golden_actions(tmp_path: Path, pi05: bool) -> None:
    config, kind = tiny(pi05), "pi05" if pi05 else "pi0"
    checkpoint = Checkpoint(find_checkpoint(str(golden_checkpoint(tmp_path, pi05))))
    assert (checkpoint.pi05, checkpoint.layout, checkpoint.directory) == (pi05, "openpi", tmp_path)
    checkpoint.check(config)
    model = build(config, FP32, checkpoint_source(checkpoint, "cpu"), "cpu")

    given = load_file(GOLDEN / "inputs" / "tiny_a1.safetensors")
    observation = observation_from_arrays(
        {name: given[f"images.{name}"].numpy() for name in CAMERAS},
        {name: given[f"image_masks.{name}"].numpy() for name in CAMERAS},
        given["state"].numpy(),
        given["tokenized_prompt"].numpy(),
        given["tokenized_prompt_mask"].numpy(),
        config=config,
        device="cpu",
    )
    with torch.inference_mode():
        actions = model.sample_actions(observation, given["noise"])
    wanted = load_file(GOLDEN / "outputs" / f"tiny_{kind}_a1_fp32.safetensors")["actions"]
    assert (actions - wanted).abs().max() < 4e-5


def test_values_read_do_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    checkpoint = Checkpoint(golden_checkpoint(tmp_path))
    value = checkpoint.read("vision.patch.weight", "cpu")
    wanted = value.clone()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(200_000))
    assert torch.equal(value, wanted)


# ---- round trips


@KINDS
@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_round_trip_is_bit_equal(tmp_path: Path, pi05: bool, layout: str, precision: Precision) -> None:
    config, model = tiny(pi05), tiny_model(pi05, precision)
    save(model, tmp_path, layout)  # type: ignore[arg-type]
    checkpoint = Checkpoint(find_checkpoint(str(tmp_path)))
    assert (checkpoint.layout, checkpoint.pi05) == (layout, pi05)
    checkpoint.check(config)
    again = build(config, precision, checkpoint_source(checkpoint, "cpu"), "cpu")
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert checkpoint.read(name, "cpu").dtype == value.dtype, name
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name


@KINDS
def test_saved_as_strict_loaders_want_it(tmp_path: Path, pi05: bool) -> None:
    model = tiny_model(pi05)
    save(model, tmp_path / "openpi", "openpi", dtype=torch.bfloat16)
    save(model, tmp_path / "lerobot", "lerobot", dtype=torch.bfloat16)
    golden = load_file(golden_checkpoint(tmp_path, pi05) / "model.safetensors")
    ours, lerobots = (load_file(tmp_path / layout / "model.safetensors") for layout in ("openpi", "lerobot"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in golden.items()}
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert not ours[UNUSED_HEAD].any()
    assert lerobots.keys() == {f"model.{key}" for key in (*golden, EMBEDDING_ALIAS)}
    assert torch.equal(lerobots[f"model.{EMBEDDING_ALIAS}"], lerobots[f"model.{EMBEDDING}"])
    raw = (tmp_path / "openpi" / "model.safetensors").read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert metadata == {"format": "pt", EMBEDDING_ALIAS: EMBEDDING}
    about = json.loads((tmp_path / "openpi" / "config.json").read_text())
    assert about == {"action_dim": 32, "pi05": pi05, "precision": "bfloat16"}
    assert [path.name for path in (tmp_path / "lerobot").iterdir()] == ["model.safetensors"]


def test_saving_over_the_file_being_read_leaves_it_readable(tmp_path: Path) -> None:
    save(tiny_model(False, seed=1), tmp_path)
    checkpoint = Checkpoint(tmp_path)
    before = checkpoint.read("embedding.weight", "cpu")
    save(tiny_model(False, seed=2), tmp_path)
    assert torch.equal(checkpoint.read("embedding.weight", "cpu"), before)
    assert not torch.equal(Checkpoint(tmp_path).read("embedding.weight", "cpu"), before)


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/below cannot be written"):
        save(tiny_model(False), tmp_path / "file" / "below")


def test_embed_tokens_goes_before_lm_head_and_the_unused_head_may_be_absent(tmp_path: Path) -> None:
    table = torch.randn(512, 48)
    edit(golden_checkpoint(tmp_path), **{EMBEDDING_ALIAS: table, UNUSED_HEAD: None})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(tiny())
    assert torch.equal(checkpoint.read("embedding.weight", "cpu"), table)


# ---- where a checkpoint is


def test_find(tmp_path: Path) -> None:
    golden_checkpoint(tmp_path)
    assert find_checkpoint(str(tmp_path)) == tmp_path
    assert find_checkpoint(str(tmp_path / "model.safetensors")) == tmp_path
    other = GOLDEN / "weights" / "tiny_pi05.safetensors"
    assert Checkpoint(find_checkpoint(str(other))).directory == other.parent


def test_find_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing/checkpoint/dir' does not exist: give a directory with model\.safet"):
        find_checkpoint(str(tmp_path / "missing/checkpoint/dir"))
    with pytest.raises(UserError, match=r"has no model\.safetensors \(there is nothing\)"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "params").mkdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"\(there is params, pytorch_model\.bin\).* JAX \(orbax\) .*convert_jax_model"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is no \.safetensors file"):
        find_checkpoint(str(tmp_path / "pytorch_model.bin"))
    with pytest.raises(UserError, match="cannot be read"):
        Checkpoint(tmp_path / "missing")


def hub(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
    module = ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repository, revision, allow_patterns))
        return str(golden_checkpoint(tmp_path))

    hub(monkeypatch, download)
    assert find_checkpoint("lerobot/pi0_base") == tmp_path
    assert find_checkpoint("lerobot/pi0_base@v1") == tmp_path
    patterns = ["*.safetensors", "*.json"]
    assert calls == [("lerobot/pi0_base", None, patterns), ("lerobot/pi0_base", "v1", patterns)]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise ConnectionError("Name or service not known\nand a long story")

    hub(monkeypatch, download)
    with pytest.raises(UserError, match=r"'lerobot/pi0_base' is no local path, .* hub: Name or service not known$"):
        find_checkpoint("lerobot/pi0_base")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"'lerobot/pi0_base' .* pip install 'pi0exp\[hub\]'"):
        find_checkpoint("lerobot/pi0_base")


# ---- what is wrong with a file


def test_truncated_file_names_the_first_tensor_beyond_its_end(tmp_path: Path) -> None:
    file = golden_checkpoint(tmp_path) / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    begin, end = header[PATCH]["data_offsets"]
    file.write_bytes(raw[: 8 + length + (begin + end) // 2])
    assert f"truncated: the tensor {PATCH} lies beyond its end" in refusal(tmp_path)
    file.write_bytes(raw[:-1])
    assert "1 bytes are missing" in refusal(tmp_path)
    for cut in (0, 5, 8, length // 2):
        file.write_bytes(raw[:cut])
        assert f"truncated: its {cut} bytes end in the header" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 1000,
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        (5).to_bytes(8, "little") + b"hello" + bytes(100),
        (2).to_bytes(8, "little") + b"[]",
        (13).to_bytes(8, "little") + b'{"a": {"b":1}' + bytes(8),
        (14).to_bytes(8, "little") + b'{"a": {"b":1}}' + bytes(8),
    ],
)
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "corrupt or no safetensors file" in refusal(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    with (golden_checkpoint(tmp_path) / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "is corrupt" in refusal(tmp_path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    assert "git lfs pull" in refusal(tmp_path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        torch.save(Bomb(tmp_path / "executed"), file) if zipped else pickle.dump(Bomb(tmp_path / "executed"), file)
    assert "anything pickled is refused" in refusal(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_missing_tensors(tmp_path: Path) -> None:
    edit(golden_checkpoint(tmp_path), **{PATCH: None})
    assert f"lacks the tensor {PATCH}:" in refusal(tmp_path)
    edit(tmp_path, **{openpi_name("action_in_proj.bias"): None})
    assert "(and 1 more)" in refusal(tmp_path)
    with pytest.raises(UserError, match=f"lacks the tensor {PATCH}"):
        Checkpoint(tmp_path).read("vision.patch.weight", "cpu")


def test_unexpected_tensors(tmp_path: Path) -> None:
    edit(golden_checkpoint(tmp_path), **{"proprio.weight": torch.zeros(1)})
    assert "holds the tensor proprio.weight, which the model has not" in refusal(tmp_path)
    edit(tmp_path, **{"proprio.bias": torch.zeros(1), PATCH: None})
    message = refusal(tmp_path)
    assert f"lacks the tensor {PATCH} and holds the tensor proprio." in message
    assert "(and 1 more)" in message


def test_misshaped_tensor(tmp_path: Path) -> None:
    edit(golden_checkpoint(tmp_path), **{PATCH: torch.zeros(144, 3, 7, 7)})
    assert f"a tensor {PATCH} of shape [144, 3, 7, 7]; the model wants [144, 3, 14, 14]" in refusal(tmp_path)


def test_tensor_that_is_not_floating(tmp_path: Path) -> None:
    edit(golden_checkpoint(tmp_path), **{PATCH: torch.zeros(144, 3, 14, 14, dtype=torch.int8)})
    assert f"a tensor {PATCH} of dtype I8" in refusal(tmp_path)


@KINDS
def test_wrong_kind_of_model(tmp_path: Path, pi05: bool) -> None:
    held, wanted = ("pi05", "pi0") if pi05 else ("pi0", "pi05")
    message = refusal(golden_checkpoint(tmp_path, pi05), not pi05)
    assert message.endswith(f"holds {held}, the model is {wanted}: use model={held}")


def test_neither_and_both_kinds(tmp_path: Path) -> None:
    edit(golden_checkpoint(tmp_path), **{"time_mlp_in.weight": torch.zeros(32, 32)})
    assert "holds both state_proj.weight (of pi0) and time_mlp_in.weight (of pi05)" in refusal(tmp_path)
    edit(tmp_path, **{"time_mlp_in.weight": None, "state_proj.weight": None})
    assert "holds neither state_proj.weight (of pi0) nor time_mlp_in.weight (of pi05)" in refusal(tmp_path)


def test_lerobots_first_port_is_not_supported(tmp_path: Path) -> None:
    key = "model.paligemma_with_expert.paligemma.language_model.model.layers.0.mlp.up_proj.weight"
    save_file({key: torch.zeros(2, 2), "model.state_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert "not supported" in message
    assert key in message
