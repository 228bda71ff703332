"""An option of another distribution is found, composed, measured and told apart; a bad one is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from cli import QUICK, REPOSITORY, artifact, environment, error_line, runs

from pi0exp import compose, plugins
from pi0exp.errors import UserError
from pi0exp.plugins import Plugin, foreign_sources

EXAMPLE = REPOSITORY / "tests" / "plugin_example"


def write_info(site: Path, value: str, name: str = "pi0exp-example", version: str = "0.1.0") -> None:
    """What an installer writes of a distribution with one entry point in our group."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[pi0exp.options]\nexample = {value}\n")


def link_example(site: Path) -> Path:
    """The example package, as if it were installed in `site`."""
    write_info(site, "pi0exp_example.conf")
    (site / "pi0exp_example").symlink_to(EXAMPLE / "src" / "pi0exp_example")
    return site


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on this process's path, whose distributions are looked for anew."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    caches = (plugins.installed, plugins._digest)
    for function in caches:
        function.cache_clear()
    yield folder
    for function in caches:
        function.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "pi0exp_example"]:
        del sys.modules[name]


def command(site: Path, scratch: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = environment(scratch)
    env["PYTHONPATH"] = os.pathsep.join([str(site), env["PYTHONPATH"]])
    line = [sys.executable, "-m", *words]
    return subprocess.run(line, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)


# ---- in this process


def test_option_of_a_plugin_composes_like_ours(site):
    link_example(site)
    assert compose.files()["attention"]["chunked"].is_relative_to(EXAMPLE)
    plain = compose.from_words(["attention=chunked", "attention.keys=3", "model=tiny"])
    assert plain["attention"]["keys"] == 3
    assert plain["names"]["attention"] == "chunked"
    stage = compose.from_words(["attention.denoise={name: chunked, keys: 5}", "model=tiny"])
    assert stage["attention"]["denoise"]["keys"] == 5
    assert stage["names"]["attention.denoise"] == "chunked"


@pytest.mark.parametrize("model", ["tiny", "tiny_pi05"])
def test_option_of_a_plugin_computes_the_same_actions(site, model):
    """Also where chunks are smaller than the padding of the prompt, so that a row sees no key of some chunk."""
    from helpers import built

    from pi0exp.policy_subject import PolicySubject

    link_example(site)
    words = [f"model={model}", "workload=masked", "workload.num_steps=3", "workload.prompt_tokens=12"]
    subject = PolicySubject.from_plain(compose.from_words([*words, "attention=chunked", "attention.keys=7"]))
    instance = built(subject)
    assert instance.verdict.wrong == []
    assert [line.split(":")[0] for line in instance.applied["attention"]] == ["vision", "prefill", "denoise"]
    assert all("chunks of 7 keys" in line for line in instance.applied["attention"])


def test_load_policy_takes_it(site):
    import pi0exp

    link_example(site)
    policy = pi0exp.load_policy(model="tiny", overrides=["attention=chunked"], device="cpu")
    assert all("chunks of 64 keys" in line for line in policy.applied["attention"])


def test_code_of_a_plugin_is_part_of_the_point(site):
    package = site / "pi0exp_example"
    (package / "conf" / "attention").mkdir(parents=True)
    (package / "chunked.py").write_text("size = 1\n")
    write_info(site, "pi0exp_example.conf", version="7.0")

    def sources(target: str = "pi0exp_example.chunked.Chunked") -> dict[str, str]:
        plugins._digest.cache_clear()
        plain = {"attention": {"_target_": "pi0exp.attention.eager.Eager", "denoise": {"_target_": target}}}
        return foreign_sources(plain)

    before = sources()
    assert list(before) == ["pi0exp_example"]
    assert before["pi0exp_example"].startswith("pi0exp-example 7.0 ")
    assert sources() == before
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "chunked.pyc").write_text("no source")
    assert sources() == before
    (package / "table.json").write_text("{}")
    with_table = sources()
    (package / "chunked.py").write_text("size = 2\n")
    assert len({before["pi0exp_example"], with_table["pi0exp_example"], sources()["pi0exp_example"]}) == 3
    assert sources("pi0exp.attention.sdpa.Sdpa") == {}


def test_code_that_is_no_plugin_counts_too(site):
    (site / "loose.py").write_text("a = 1\n")
    plain = {"subject": {"_target_": "loose.Thing"}}
    before = foreign_sources(plain)
    plugins._digest.cache_clear()
    (site / "loose.py").write_text("a = 2\n")
    assert before.keys() == {"loose"}
    assert len(before["loose"]) == 16
    assert foreign_sources(plain) != before


def test_point_names_the_code_of_others_only_where_there_is_any():
    from pi0exp.point import experiment_of

    plain = helpers.plain_config("model=tiny")
    assert "plugins" not in experiment_of(plain)
    plain["subject"] = {"_target_": "toy_subjects.Toy", "fault": "none"}
    assert list(experiment_of(plain)["plugins"]) == ["toy_subjects"]


# ---- what is refused


@pytest.mark.parametrize(
    ("value", "text"),
    [("no_such_package.conf", "cannot be loaded: No module named 'no_such_package'"), ("json.tool", "is no package")],
)
def test_broken_entry_point_is_refused(site, value, text):
    write_info(site, value)
    with pytest.raises(UserError, match=f"pi0exp-example: the entry point example = '{value}'.*{text}"):
        compose.register()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("attention/eager.yaml", r"pi0exp-example 0\.1\.0 brings attention/eager\.yaml, which .* is already"),
        ("study/ladder.yaml", r"brings study/ladder\.yaml, which"),
        ("atention/mine.yaml", "brings atention/mine.yaml; there is no group atention: attention, "),
        ("hydra/mine.yaml", "there is no group hydra"),
    ],
)
def test_name_that_is_taken_or_nowhere_is_refused(site, file, text):
    write_info(site, "taken.conf")
    path = site / "taken" / "conf" / file
    path.parent.mkdir(parents=True)
    path.write_text("_target_: taken.Mine\n")
    with pytest.raises(UserError, match=text):
        compose.from_words([])


def test_two_plugins_with_one_name_are_refused(tmp_path, monkeypatch):
    made = []
    for name in ("first", "second"):
        folder = tmp_path / name
        (folder / "gemm").mkdir(parents=True)
        (folder / "gemm" / "mine.yaml").write_text("")
        made.append(Plugin(name, "1", name, folder))
    monkeypatch.setattr(plugins, "installed", lambda: tuple(made))
    with pytest.raises(UserError, match=r"second 1 brings gemm/mine\.yaml, which .*first/gemm/mine\.yaml is already"):
        compose.files()


def test_refusal_on_the_command_line(tmp_path):
    site = tmp_path / "site"
    write_info(site, "gone.conf", name="forgotten")
    for words in (["pi0exp", "--help"], ["pi0exp", "model=tiny"], ["pi0exp.machine"]):
        text = error_line(command(site, tmp_path, *words))
        assert text.startswith("forgotten: the entry point example = 'gone.conf' of pi0exp.options cannot be loaded")


# ---- installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that an offline install of the example fills."""
    import shutil

    source, target = tmp_path_factory.mktemp("source") / "example", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*line, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_installed_option_is_shown_measured_and_settled(installed, tmp_path):
    shown = command(installed, tmp_path, "pi0exp", "--help")
    assert "attention: chunked, " in shown.stdout.replace("aiter, ", "")
    parts = command(installed, tmp_path, "pi0exp", "--info", "defaults", "attention=chunked")
    assert "attention/chunked" in parts.stdout
    assert "pi0exp-example 0.1.0" in command(installed, tmp_path, "pi0exp", "--info", "searchpath").stdout

    words = [f"track.root={tmp_path}", *QUICK, "attention=eager", "attention.denoise=chunked"]
    done = command(installed, tmp_path, "pi0exp", *words)
    assert done.returncode == 0, done
    assert "attention=eager attention.denoise=chunked" in done.stdout
    [run] = runs(tmp_path)
    record = json.loads(artifact(tmp_path, run, "result.json").read_text())
    assert record["outcome"] == "ok"
    assert record["experiment"]["plugins"]["pi0exp_example"].startswith("pi0exp-example 0.1.0 ")
    assert any("chunks of 64 keys" in line for line in record["applied"]["attention"])
    assert "already measured" in command(installed, tmp_path, "pi0exp", *words).stdout

    sweep = command(installed, tmp_path, "pi0exp", "-m", *words[:-2], "attention=eager,chunked", "measure.explain=true")
    assert sweep.returncode == 0, sweep
    assert "chunks of 64 keys" in sweep.stdout
    table = command(installed, tmp_path, "pi0exp.machine", "--json")
    rows = json.loads(table.stdout)["options"]
    [row] = [row for row in rows if row["name"] == "chunked"]
    assert row == {
        "group": "attention",
        "name": "chunked",
        "numerics": "REORDERED",
        "reasons": [],
        "plugin": "pi0exp-example 0.1.0",
        "ready": True,
    }
