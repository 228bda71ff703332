import hashlib
from pathlib import Path

import pytest
from helpers import plain_config

import pi0exp
from pi0exp import key
from pi0exp.errors import UserError
from pi0exp.key import digest_sources, point_key
from pi0exp.point import experiment_of

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
