"""A result that waits is brought in whatever happened to its run and to the folders meanwhile, and can be read then."""

import json
from dataclasses import replace

import pytest

from pi0exp import load
from pi0exp.errors import UserError
from pi0exp.load import recover, write_record
from pi0exp.owner import Owner, this_process
from pi0exp.result import Outcome, Result, record
from pi0exp.spool import Spool
from pi0exp.track import Store, Stored

KEY = "0123456789abcdef"
DEAD = replace(this_process(), began="1")


def point(study: str, key: str = KEY) -> dict:
    result = Result(
        Outcome.OK,
        metrics={"latency_ms/p50": 20.5},
        samples={"latency_ms": [20.0, 21.0]},
        fingerprint={"gpu": "NVIDIA H200"},
    )
    return record(key, study, {"attention": "sdpa"}, {"workload": {"batch_size": 1}}, result)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def store(root) -> Store:
    return Store.open(None, root)


def begun(store: Store, one: dict, owner: Owner = DEAD) -> str:
    """A run without a result, of a process that is gone."""
    return store.start(one["study"], "sdpa", one["key"], one["params"], {"owner": str(owner)})


def waiting(store: Store, run_id: str, one: dict) -> None:
    """The result of a run in a file, as a command leaves it that is killed before it has logged it."""
    folder = store.spool._folders[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run_id}+{DEAD}.json").write_text(json.dumps(one))


def test_result_is_brought_in_before_its_run_is_marked(store, study):
    one = point(study)
    run_id, other = begun(store, one), begun(store, one)
    waiting(store, run_id, one)
    recover(store, study)
    assert store.settled(study, KEY) == Stored(run_id, one)
    assert store.spool.waiting == []
    assert "torn" not in store._client.get_run(run_id).data.tags
    assert store._client.get_run(other).data.tags["outcome"] == "interrupted"


def test_result_that_comes_after_its_run_was_marked_can_be_read(store, study):
    one = point(study)
    run_id = begun(store, one)
    assert store.mark_torn(study) == 1
    assert store.runs(study) == []
    waiting(store, run_id, one)
    recover(store, study)
    assert store.settled(study, KEY) == Stored(run_id, one)
    run = store._client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["outcome"], run.data.tags["torn"], run.data.tags["reasons"]) == ("ok", "", "")


def test_run_that_another_machine_took_for_dead_is_read_once_it_is_finished(store, study, monkeypatch):
    one = point(study)
    run_id = begun(store, one, this_process())
    monkeypatch.setattr(Owner, "alive", lambda owner: False)
    log_text = store._client.log_text

    def marked_meanwhile(*given) -> None:
        store.mark_torn(study)
        log_text(*given)

    monkeypatch.setattr(store._client, "log_text", marked_meanwhile)
    store.finish(run_id, one)
    assert store.settled(study, KEY) == Stored(run_id, one)
    assert store._client.get_run(run_id).data.tags["reasons"] == ""


def test_no_reader_sees_a_torn_outcome(store, study, monkeypatch):
    """Each change of the run that was marked leaves it without a result, or with all of it."""
    one, seen = point(study), []
    run_id = begun(store, one)
    store.mark_torn(study)

    def watched(name: str) -> None:
        change = getattr(store._client, name)

        def then_look(*given, **named) -> None:
            change(*given, **named)
            tags = store._client.get_run(run_id).data.tags
            seen.append((tags["outcome"], bool(tags["torn"]), len(store.runs(study))))

        monkeypatch.setattr(store._client, name, then_look)

    for name in ("log_text", "log_batch", "set_tag", "set_terminated"):
        watched(name)
    store.finish(run_id, one)
    assert set(seen) == {("interrupted", True, 0), ("ok", False, 1)}
    assert seen == sorted(seen), "first the one, then the other"


def test_result_of_a_run_that_kept_its_mark_can_be_read(store, study):
    """As earlier versions left it."""
    one = point(study)
    run_id = begun(store, one)
    store.finish(run_id, one)
    store._client.set_tag(run_id, "torn", "true")
    assert store.settled(study, KEY) == Stored(run_id, one)
    assert store.runs(study) == [Stored(run_id, one)]


def test_load_brings_in_what_waits(store, root, study, tmp_path, capsys):
    """`python -m pi0exp.load`, which experiments/campaign.py calls too, may be the first command after the kill."""
    one, other = point(study), point(study, "f" * 16)
    run_id = begun(store, one)
    waiting(store, run_id, one)
    torn = store.start(study, "sdpa", other["key"], {}, {"imported": "true", "owner": str(DEAD)})
    files = [str(write_record(record, tmp_path)) for record in (one, other)]
    assert load.main([*files, "--root", str(root)]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("2 files: 1 loaded, 1 already there\n")
    assert shown.err.endswith(".json was brought into the store\n")
    assert store.settled(study, KEY) == Stored(run_id, one)
    assert store.spool.waiting == []
    assert len(store.runs(study)) == 2
    assert store._client.get_run(torn).info.lifecycle_stage == "deleted", "a load that was killed"


# ---- folders that became unusable


@pytest.fixture
def folders(tmp_path):
    """Beside the store, and to fall back to, where a result waits."""
    beside, fallback = tmp_path / "mlruns" / ".spool", tmp_path / "tmp"
    fallback.mkdir()
    (fallback / f"run+{DEAD}.json").write_text("{}")
    return beside, fallback


@pytest.mark.parametrize("there", ["a file", "nothing below a file"])
def test_result_is_brought_in_though_the_folder_beside_the_store_is_unusable(folders, there):
    beside, fallback = folders
    place = beside if there == "a file" else beside.parent
    place.parent.mkdir(exist_ok=True)
    place.write_text("in the way")
    taken = []
    Spool(*folders).bring_in(lambda run_id, path: taken.append(run_id))
    assert taken == ["run"]
    assert list(fallback.glob("*.json")) == []
    Spool(*folders).bring_in(lambda run_id, path: pytest.fail("nothing waits"))


def test_room_that_a_killed_command_kept_is_given_back(folders):
    """Beside the store, though the result went to the other folder: that disk was read-only then."""
    beside, _ = folders
    beside.mkdir(parents=True)
    (beside / f".{DEAD}.room").write_text("room")
    Spool(*folders).bring_in(lambda run_id, path: None)
    assert list(beside.iterdir()) == []


def test_folder_with_results_that_cannot_be_written_is_told_in_one_line(folders):
    (folders[1] / ".lock").mkdir()
    with pytest.raises(UserError) as caught:
        Spool(*folders).bring_in(lambda run_id, path: pytest.fail("nobody else may be kept from it"))
    told = f"{folders[1]}: Is a directory; results that wait there cannot be brought into the store"
    assert str(caught.value) == told
    assert len(Spool(*folders).waiting) == 1
