import hashlib
from pathlib import Path

import pytest
import torch
from helpers import plain_config, subject_of, tiny_policy

import pi0exp
from pi0exp import key
from pi0exp.differences import other_work
from pi0exp.errors import UserError
from pi0exp.key import digest_sources, point_key
from pi0exp.model.checkpoint import save
from pi0exp.point import experiment_of
from pi0exp.preprocess import statistics_files
from pi0exp.recording import find_observations

EXPERIMENT = {"attention": {"_target_": "sdpa"}, "workload": {"batch_size": 1}}
MACHINE = {"gpu": "NVIDIA H200", "torch": "2.13.0"}


def test_key_is_stable_and_says_nothing_of_the_order():
    assert len(point_key(EXPERIMENT, MACHINE)) == 16
    assert int(point_key(EXPERIMENT, MACHINE), 16) >= 0
    assert point_key(dict(reversed(EXPERIMENT.items())), dict(reversed(MACHINE.items()))) == point_key(
        EXPERIMENT, MACHINE
    )


def test_key_changes_with_experiment_machine_and_source(monkeypatch):
    keys = {point_key(EXPERIMENT, MACHINE)}
    keys.add(point_key(EXPERIMENT | {"workload": {"batch_size": 2}}, MACHINE))
    keys.add(point_key(EXPERIMENT, MACHINE | {"torch": "2.12.0"}))
    keys.add(point_key({}, {}))
    monkeypatch.setattr(key, "source_digest", lambda: "other code")
    keys.add(point_key(EXPERIMENT, MACHINE))
    assert len(keys) == 5


def test_content_of_a_file_that_an_option_names_is_in_the_key(tmp_path):
    table, sidecar = tmp_path / "table.csv", tmp_path / "table.json"

    def asked(*words: str) -> dict:
        return experiment_of(plain_config(f"gemm.table={table}", *words))

    with pytest.raises(UserError, match=f"{table}: No such file"):
        asked("gemm=aiter")
    assert "files" not in experiment_of(plain_config("gemm=aiter")), "the shipped table is among the sources"
    table.write_text("Validator,A,1\nGemm,tn,Default,0.01\n")
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    for option in ("aiter", "tunable"):
        assert asked(f"gemm={option}")["files"] == {str(table): digest}
    stage = f"gemm.denoise={{name: aiter, table: '{table}'}}"
    assert experiment_of(plain_config(stage))["files"] == {str(table): digest}

    keys = {point_key(asked("gemm=aiter"), MACHINE)}
    sidecar.write_text("{}")
    assert set(asked("gemm=aiter")["files"]) == {str(table), str(sidecar)}
    keys.add(point_key(asked("gemm=aiter"), MACHINE))
    table.write_text("Validator,A,1\nGemm,tn,Default,0.02\n")
    keys.add(point_key(asked("gemm=aiter"), MACHINE))
    assert len(keys) == 3


def test_content_of_weights_and_recordings_is_in_the_key(tmp_path):
    recording, tokenizer, weights = tmp_path / "some.npz", tmp_path / "tokenizer.model", tmp_path / "weights"
    statistics = weights / "assets" / "robot" / "norm_stats.json"
    shipped = find_observations("aloha_sim.npz").read_bytes()
    words = [
        "model=tiny", "workload=aloha", f"workload.observations={recording}", f"workload.tokenizer={tokenizer}",
        f"model.checkpoint={weights}",
    ]  # fmt: skip

    model = tiny_policy().model
    save(model, weights)
    first = (weights / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    save(model, weights)
    second = (weights / "model.safetensors").read_bytes()

    def write(tensors: bytes = first, **content: bytes) -> dict:
        (weights / "model.safetensors").write_bytes(tensors)
        for path, name in ((recording, "recording"), (tokenizer, "tokenizer"), (statistics, "statistics")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.get(name, shipped))
        return experiment_of(plain_config(*words))

    plain = write()
    assert set(plain["files"]) == {
        "model.checkpoint", "model.checkpoint assets/robot/norm_stats.json", "workload.observations",
        "workload.tokenizer",
    }  # fmt: skip
    assert statistics_files(weights) == [statistics]
    assert plain["files"] == write()["files"], "writing the same again makes no other point"
    other = [write(second), write(recording=b"1"), write(tokenizer=b"1"), write(statistics=b"1")]
    assert len({point_key(one, MACHINE) for one in (plain, *other)}) == 5
    told = [other_work({"experiment": plain}, {"experiment": one}) for one in other]
    assert told == [["model"], ["workload"], ["workload"], ["model"]]
    recording.unlink()
    with pytest.raises(UserError, match=r"some\.npz"):
        experiment_of(plain_config(*words))
    assert subject_of("model=tiny").files() == {}


def checkout(folder: Path, linked: bool) -> Path:
    """A package with linked folders, as in a checkout, or with plain ones, as it is installed."""
    package = folder / "pi0exp"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "layers.py").write_text("x = 1\n")
    for name in ("kernels", "conf", "experiments"):
        place = (folder if linked else package) / name
        (place / "inner").mkdir(parents=True)
        (place / "inner" / "one.py").write_text(f"# {name}\n")
        (place / "note.yaml").write_text("a: 1\n")
        if linked:
            (package / name).symlink_to(f"../{name}")
    return package


def test_digest_sees_code_and_kernels_only(tmp_path):
    package = checkout(tmp_path, linked=True)
    before = digest_sources(package)
    for reader in ("report", "search"):
        (package / reader).mkdir()
    for unseen in (
        "report/page.py",
        "search/loop.py",
        "conf/inner/one.py",
        "experiments/inner/one.py",
        "kernels/note.yaml",
        "model/layers.txt",
    ):
        (package / unseen).write_text("changed")
        assert digest_sources(package) == before, unseen
    digests = {before}
    for seen in ("kernels/inner/one.py", "kernels/two.py", "model/layers.py", "model/tuned.csv", "__init__.py"):
        (package / seen).write_text("changed = True\n")
        digests.add(digest_sources(package))
    (package / "model" / "layers.py").rename(package / "model" / "renamed.py")
    digests.add(digest_sources(package))
    assert len(digests) == 7


def test_digest_is_the_same_in_a_checkout_and_installed(tmp_path):
    assert digest_sources(checkout(tmp_path / "a", linked=True)) == digest_sources(
        checkout(tmp_path / "b", linked=False)
    )


def test_digest_of_this_package_is_read_once():
    assert key.source_digest() == key.source_digest()
    assert key.source_digest.cache_info().currsize == 1
    assert len(digest_sources(Path(pi0exp.__file__).parent)) == 64
