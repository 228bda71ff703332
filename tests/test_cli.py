"""`python -m pi0exp` as a user meets it: what it measures and stores, what it prints, how it ends, what it refuses."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from cli import QUICK, REPOSITORY, TOY, artifact, environment, error_line, module, pi0exp, runs
from helpers import GROUPS_OF
from mlflow import MlflowClient

from pi0exp import folders, outcomes
from pi0exp.config import GROUPS

SWEEP = (*QUICK, "-m", "attention=eager,sdpa", "graphs=none,manual")
_ABOVE = ["9_blocks", "10_persistent", "11_hopper", "12_tuned"]
_NUMBERED = [name for name in GROUPS_OF["stack"] if name[0].isdigit() and name not in _ABOVE]
RUNGS = [*_NUMBERED, "h200_best", *_ABOVE, "mi350_best"]
NO_GPU = "graphs: needs a GPU of nvidia or amd; this machine has no GPU that torch can use"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("mlruns")


@pytest.fixture(scope="module")
def sweep(root):
    """Four points on a CPU, of which two need a GPU; with result files beside the store."""
    done = pi0exp(root, *SWEEP, f"track.results={root}/results")
    assert done.returncode == 0, done
    return done


def settled(text: str) -> int:
    return text.count("(already measured; resume=false measures again)")


def test_sweep_records_every_point(sweep, root):
    found = runs(root)
    assert [run.data.tags["outcome"] for run in found] == ["ok", "unsupported", "ok", "unsupported"]
    assert {run.info.status for run in found} == {"FINISHED"}
    options = [("eager", "none"), ("eager", "manual"), ("sdpa", "none"), ("sdpa", "manual")]
    assert [(run.data.params["attention"], run.data.params["graphs"]) for run in found] == options
    assert [run.data.tags["reasons"] for run in found] == ["", NO_GPU, "", NO_GPU]
    assert not found[1].data.metrics
    names = ["plain", "graphs=manual", "attention=sdpa", "attention=sdpa graphs=manual"]
    assert [run.info.run_name for run in found] == [f"tiny  default  {name}" for name in names]
    assert len({run.data.tags["key"] for run in found}) == 4


def test_run_has_params_tags_and_metrics(sweep, root):
    run = runs(root)[2]
    params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
    assert {name: params[name] for name in GROUPS} == {
        "precision": "bf16",
        "image_masking": "keep",
        "fusion": "none",
        "gemm": "blas",
        "attention": "sdpa",
        "compile_mode": "none",
        "graphs": "none",
    }
    workload = {name.removeprefix("workload."): value for name, value in params.items() if "workload." in name}
    assert workload == {
        "batch_size": "1",
        "cameras_present": "111",
        "prompt_tokens": "20",
        "prompt_padded": "20",
        "horizon": "10",
        "num_steps": "10",
        "seed": "0",
    }
    assert (params["model"], params["workload"], params["measure"]) == ("tiny", "default", "quick")
    assert set(params) == {*GROUPS, "model", "workload", "measure", *(f"workload.{name}" for name in workload)}

    ours = {"outcome", "reasons", "numerics", "key", "gpu", "torch", "commit", "dirty", "study"}
    assert ours <= set(tags)
    assert "arch" not in tags, "a CPU has none"
    assert (tags["numerics"], tags["gpu"], tags["study"]) == ("REORDERED", "CPU", "adhoc")
    assert re.fullmatch("[0-9a-f]{16}", tags["key"])

    latency = {f"latency_ms/{name}" for name in ("p50", "p10", "p90", "p99", "mean", "std")}
    errors = {"error/rel_l2", "error/rel_l2_plain_bf16", "error/max_abs"}
    others = {"latency_host_ms/p50", "throughput_hz", "startup_s/build", "startup_s/first_call"}
    assert latency | errors | others <= set(metrics)
    assert metrics["throughput_hz"] == pytest.approx(1000 / metrics["latency_ms/p50"])
    assert not any(name.startswith(("memory_mb", "roofline", "ceilings")) for name in metrics), "those need a GPU"
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    assert len(client.get_metric_history(run.info.run_id, "samples/latency_ms")) == 3


def test_cards_and_table_go_to_stdout_and_progress_to_stderr(sweep):
    cards, table = sweep.stdout.split("#  attention  graphs")
    lines = cards.splitlines()
    assert re.findall(r"(\w+)=", lines[0]) == list(GROUPS), "in the order in which they are applied"
    assert [line.split()[0] for line in lines[:12]] == [
        *("stack", "model", "workload", "measure", "facts", "machine", "latency", "host", "stages", "error"),
        *("warm-up", "outcome"),
    ]
    assert "tokens stand-in" in lines[4]
    assert "weights random" in lines[4]
    rows = [line.split() for line in table.splitlines() if line[:1].isdigit()]
    assert [row[:3] for row in rows] == [
        ["0", "eager", "none"],
        ["1", "eager", "manual"],
        ["2", "sdpa", "none"],
        ["3", "sdpa", "manual"],
    ]
    assert [row[6] for row in rows] == ["ok", "unsupported:", "ok", "unsupported:"]
    assert "this machine has no GPU that torch can use" in " ".join(table.split())
    progress = sweep.stderr.splitlines()
    assert progress
    assert all(line.startswith(("[tiny  default  plain] ", "[tiny  default  attention=sdpa] ")) for line in progress)
    assert "\x1b" not in sweep.stdout + sweep.stderr


def test_same_command_measures_nothing(sweep, root):
    before = len(runs(root))
    done = pi0exp(root, *SWEEP)
    assert done.returncode == 0
    assert done.stderr == ""
    assert settled(done.stdout) == 4
    single = pi0exp(root, *QUICK, "graphs=manual")
    assert (single.returncode, settled(single.stdout)) == (3, 1), "unsupported is no success of a single point"
    assert len(runs(root)) == before


@pytest.mark.slow
def test_sweep_of_one_point_is_a_sweep(sweep, root):
    alone = pi0exp(root, *QUICK, "-m", "graphs=manual")
    assert (alone.returncode, settled(alone.stdout)) == (0, 1)


def test_what_is_measured_again(sweep, root):
    before = runs(root)
    assert pi0exp(root, *QUICK, "resume=false", "graphs=manual").returncode == 3
    assert pi0exp(root, *QUICK, "graphs=manual", "workload.horizon=11").returncode == 3
    again, other = runs(root)[len(before) :]
    assert again.data.tags["key"] == before[1].data.tags["key"]
    assert other.data.tags["key"] not in {run.data.tags["key"] for run in before}
    assert other.data.params["workload.horizon"] == "11"


def test_results_are_carried_to_another_store(sweep, root, tmp_path):
    keys = {run.data.tags["key"] for run in runs(root)[:4]}
    files = sorted((root / "results" / "adhoc" / "cpu").iterdir())
    assert {file.stem for file in files} >= keys
    loaded = module("pi0exp.load", root / "results", "--root", tmp_path, scratch=tmp_path)
    assert loaded.returncode == 0, loaded
    done = pi0exp(tmp_path, *SWEEP, f"track.results={tmp_path}/results")
    assert (done.returncode, done.stderr, settled(done.stdout)) == (0, "", 4)
    assert len(runs(tmp_path)) == len(files)
    copies = sorted((tmp_path / "results" / "adhoc" / "cpu").iterdir())
    assert [file.read_text() for file in copies] == [file.read_text() for file in files if file.stem in keys]


def test_child_can_be_run_by_hand(sweep, root, tmp_path):
    source = artifact(root, runs(root)[0], "experiment.json")
    done = module("pi0exp.measure", source, tmp_path / "result.json", scratch=tmp_path)
    assert done.returncode == 0, done
    assert "[pi0exp] warm up" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["outcome"] == "ok"
    assert result["metrics"]["latency_ms/p50"] > 0


WRONG_FILES = [("one.json",), ("1", "2", "3")]


@pytest.mark.parametrize("words", [(), *(pytest.param(w, marks=pytest.mark.slow) for w in WRONG_FILES)])
def test_child_without_its_two_files_says_what_it_wants(tmp_path, words):
    done = module("pi0exp.measure", *words, scratch=tmp_path)
    assert done.returncode == 2
    assert "python -m pi0exp.measure EXPERIMENT.json RESULT.json" in done.stderr


@pytest.mark.slow
def test_child_says_what_it_is_for(tmp_path):
    done = module("pi0exp.measure", "--help", scratch=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m pi0exp.measure EXPERIMENT.json RESULT.json" in done.stdout


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file"),
        ("{}", "measure is None"),
        pytest.param("{", "Expecting", marks=pytest.mark.slow),
        pytest.param("[]", "a JSON object", marks=pytest.mark.slow),
        pytest.param("\xff", "", marks=pytest.mark.slow),
    ],
)
def test_child_refuses_an_experiment_that_it_cannot_read(tmp_path, content, cause):
    source = tmp_path / "experiment.json"
    if content is not None:
        source.write_text(content, encoding="latin-1")
    done = module("pi0exp.measure", source, tmp_path / "result.json", scratch=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("pi0exp.measure: ")
    assert len(done.stderr.splitlines()) == 1
    assert cause in done.stderr
    assert not (tmp_path / "result.json").exists()


def nan_recording(folder):
    known = np.load(REPOSITORY / "experiments" / "observations" / "aloha_sim.npz")
    arrays = {name: known[name].copy() for name in known.files}
    arrays["state_N14"][0, 3] = np.nan
    np.savez(folder / "nan.npz", **arrays)
    return f"{folder}/nan.npz"


def corrupt_checkpoint(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not the header")
    return str(folder)


def file_in_place(folder):
    (folder / "file").write_text("")
    return f"{folder}/file"


@pytest.mark.parametrize(
    ("words", "causes"),
    [
        (["attention=flsh"], ["attention/flsh", "eager, sdpa"]),
        pytest.param(["workload=nope"], ["workload/nope", "aloha, default, masked, pi05"], marks=pytest.mark.slow),
        pytest.param(["study=nope"], ["study/nope", "ladder"], marks=pytest.mark.slow),
        pytest.param(["stack=nope"], ["stack/nope", "0_eager"], marks=pytest.mark.slow),
        pytest.param(["workload.bach=2"], ["workload.bach"], marks=pytest.mark.slow),
        pytest.param(["attention=null"], ["Config group override"], marks=pytest.mark.slow),
        pytest.param(["foo=1"], ["foo: there is no group or setting foo"], marks=pytest.mark.slow),
        (["+foo=1"], ["foo: no such setting", "resume", "workload"]),
        pytest.param(["+workload.foo=1"], ["workload.foo"], marks=pytest.mark.slow),
        pytest.param(["+attention.foo=1"], ["attention.foo"], marks=pytest.mark.slow),
        pytest.param(["workload.batch_size=two"], ["workload.batch_size", "'two'", "Integer"], marks=pytest.mark.slow),
        (["workload.batch_size=0"], ["workload.batch_size is 0", "1 or more"]),
        pytest.param(["workload.num_steps=-1"], ["workload.num_steps is -1"], marks=pytest.mark.slow),
        pytest.param(["measure.timeout_s=soon"], ["measure.timeout_s", "'soon'"], marks=pytest.mark.slow),
        pytest.param(["measure.device=tpu"], ["measure.device", "auto, gpu, cpu"], marks=pytest.mark.slow),
        pytest.param(["attention=["], ["'attention=['"], marks=pytest.mark.slow),
        pytest.param(["attention"], ["'attention'"], marks=pytest.mark.slow),
        pytest.param(
            ["attention.denoise=flsh"], ["attention.denoise is 'flsh'", "eager, sdpa"], marks=pytest.mark.slow
        ),
        (["attention.denoise={name: sdpa, foo: 1}"], ["attention.denoise.foo", "backend"]),
        pytest.param(["graphs.denoise=manual"], ["graphs.denoise"], marks=pytest.mark.slow),
        pytest.param(["attention=eager,sdpa"], ["attention=eager,sdpa", "--multirun"], marks=pytest.mark.slow),
        pytest.param(["model.checkpoint=/nope"], ["'/nope' does not exist"], marks=pytest.mark.slow),
        (["model.checkpoint={corrupt_checkpoint}"], ["model.safetensors"]),
        pytest.param(["workload=aloha", "workload.tokenizer=nope"], ["tokenizer nope"], marks=pytest.mark.slow),
        pytest.param(
            ["workload=aloha", "workload.observations=nope"],
            ["workload.observations is nope", "aloha_sim.npz"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["workload=aloha", "workload.observations={nan_recording}"],
            ["state_N14[0, 3] is nan"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["~workload"], ["workload is None"], marks=pytest.mark.slow),
        pytest.param(["~attention"], ["attention is None"], marks=pytest.mark.slow),
        pytest.param(["resume=perhaps"], ["resume", "'perhaps'"], marks=pytest.mark.slow),
        pytest.param(["track=3"], ["conf/config.yaml"], marks=pytest.mark.slow),
        pytest.param(["name=a/b"], ["'a/b'"], marks=pytest.mark.slow),
        pytest.param(["subject=null"], ["must be a string or a list"], marks=pytest.mark.slow),  # Hydra's words
        pytest.param(["subject=nothing"], ["subject/nothing", "policy"], marks=pytest.mark.slow),
        pytest.param(["subject._target_=json.dumps"], ["json.dumps"], marks=pytest.mark.slow),
        pytest.param(["subject._target_=nowhere.Nothing"], ["nowhere.Nothing"], marks=pytest.mark.slow),
        (["track.root={file_in_place}"], ["is a file where a folder must be"]),
        pytest.param(["track.results={file_in_place}"], ["file: "], marks=pytest.mark.slow),
        (["study=ladder", "attention=sdpa"], ["attention=sdpa would hold for every stack of study=ladder"]),
        pytest.param(
            ["study=ladder", "image_masking=keep,skip"], ["image_masking=keep", "study=ladder"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] or "~" in value[0] else "",
)
def test_refused_in_one_line(words, causes, tmp_path):
    makers = (nan_recording, corrupt_checkpoint, file_in_place)
    for maker in makers:
        words = [
            word.replace(f"{{{maker.__name__}}}", maker(tmp_path)) if maker.__name__ in word else word for word in words
        ]
    done = pi0exp(tmp_path / "mlruns", *QUICK, *words)
    line = error_line(done)
    assert [cause for cause in causes if cause not in line] == [], line
    assert done.stdout == ""
    assert not list((tmp_path / "mlruns").glob("*/*/artifacts")), "nothing was recorded"


def test_sweep_is_composed_before_its_first_point(tmp_path):
    done = pi0exp(tmp_path, *QUICK, "-m", "attention=eager,flsh", store=False)
    assert "attention/flsh" in error_line(done)
    assert not (tmp_path / "mlflow.db").exists()


def test_sweep_goes_on_after_a_point_that_is_refused(root):
    done = pi0exp(root, *QUICK, "graphs=manual", "-m", "workload.batch_size=0,1")
    assert "workload.batch_size is 0" in error_line(done)
    rows = [line.split() for line in done.stdout.split("#  workload.batch_size")[1].splitlines()]
    assert [row[5] for row in rows if row[:1] in (["0"], ["1"])] == ["refused:", "unsupported:"]


def test_exit_code_of_a_sweep_is_its_worst(monkeypatch):
    def code(sweep: bool, *codes: int) -> int:
        monkeypatch.setattr(outcomes, "POINTS", [{"exit_code": each, "sweep": sweep} for each in codes])
        return outcomes.exit_code()

    assert code(False, 3) == 3
    assert code(True, 3) == 0
    assert code(True, 0, 3, 0) == 0
    assert code(True, 0, 3, 4) == 4
    assert code(True, 5, 4, 2) == 5
    assert code(False) == 0


@pytest.mark.slow
def test_study_is_measured_once(tmp_path):
    first = pi0exp(tmp_path, *QUICK, "study=ladder", "workload=default")
    assert first.returncode == 0, first
    found = runs(tmp_path, "ladder")
    assert [run.data.params["stack"] for run in found] == RUNGS
    assert [run.data.tags["outcome"] for run in found] == ["ok", *["unsupported"] * (len(RUNGS) - 1)]
    assert found[0].info.run_name == "tiny  default  0_eager"
    second = pi0exp(tmp_path, *QUICK, "study=ladder", "workload=default")
    assert (second.returncode, second.stderr, settled(second.stdout)) == (0, "", len(RUNGS))
    assert len(runs(tmp_path, "ladder")) == len(RUNGS)


@pytest.mark.slow
def test_study_of_one_stack(tmp_path):
    assert pi0exp(tmp_path, *QUICK, "study=ladder", "workload=default", "stack=0_eager").returncode == 0
    assert [run.data.params["stack"] for run in runs(tmp_path, "ladder")] == ["0_eager"]


@pytest.mark.slow
def test_recorded_observation_and_stages(tmp_path):
    done = pi0exp(tmp_path, *QUICK, "workload=aloha", "attention=sdpa", "attention.denoise={name: eager}")
    assert done.returncode == 0, done
    [run] = runs(tmp_path)
    assert run.data.params["attention.denoise"] == "eager"
    assert run.data.params["workload.cameras_present"] == "100"
    assert run.data.tags["facts.tokens"].startswith("stand-in")
    assert "attention=sdpa attention.denoise=eager" in done.stdout


def test_help_is_quick_and_complete(tmp_path):
    def of_children() -> float:
        """Seconds of a processor, which do not depend on who else wants one."""
        return os.times().children_user + os.times().children_system

    started = of_children()
    done = module("pi0exp", "--help", scratch=tmp_path)
    assert done.returncode == 0
    assert of_children() - started < 6, "one or two where nothing else runs"
    for group in (REPOSITORY / "conf").iterdir():
        if group.is_dir() and group.name != "hydra":
            options = ", ".join(sorted(file.stem for file in group.glob("*.yaml")))
            assert f"{group.name}: {options}\n" in done.stdout
    studies = ", ".join(sorted(file.stem for file in (REPOSITORY / "experiments" / "study").glob("*.yaml")))
    assert f"study: {studies}\n" in done.stdout
    assert not any(line.startswith("results/") for line in done.stdout.splitlines()), "what lies there is no option"
    assert done.stdout.count("python -m pi0exp ") >= 10
    assert done.stderr == ""


def test_help_asks_no_folder_of_results():
    source = folders.Studies("pi0exp", f"studies://{REPOSITORY / 'experiments'}")
    assert source.list("", None) == ["study"]
    assert "ladder" in source.list("study", None)


def test_help_imports_nothing_heavy(tmp_path):
    line = [sys.executable, "-X", "importtime", "-m", "pi0exp", "--help"]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment(tmp_path), capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "mlflow", "numpy", "triton"}


def test_composed_configuration_can_be_seen(tmp_path):
    shown = module("pi0exp", "--cfg", "job", "model=tiny", "workload.seed=3", scratch=tmp_path)
    assert shown.returncode == 0
    assert "  seed: 3\n" in shown.stdout
    parts = module("pi0exp", "--info", "defaults", "stack=2_sdpa", scratch=tmp_path)
    assert parts.returncode == 0
    assert "attention/sdpa" in parts.stdout


@pytest.mark.slow
def test_multirun_flag_may_stand_anywhere(tmp_path):
    done = pi0exp(tmp_path, *TOY, "-m", "~model", "~workload", "+subject.fault=unmet")
    assert done.returncode == 0, done
    assert "#  p50 ms" in done.stdout


def test_console_script_leads_to_main():
    import tomllib

    from pi0exp.__main__ import main

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"pi0exp": "pi0exp.__main__:main"}
    assert callable(main)


@pytest.mark.slow
def test_one_line_on_a_terminal_for_progress(tmp_path):
    """On a terminal the progress is one line that is gone in the end."""
    import pty

    parent, child = pty.openpty()
    line = [sys.executable, "-m", "pi0exp", f"track.root={tmp_path}", *TOY, "~model", "~workload"]
    process = subprocess.Popen(
        line, cwd=REPOSITORY, env=environment(tmp_path) | {"TERM": "xterm"}, stdout=child, stderr=subprocess.PIPE
    )
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # the terminal is closed
            break
    assert process.wait(60) == 0
    os.close(parent)
    assert process.stderr.read() == b""
    process.stderr.close()
    assert b"warm up" in shown
    assert b"outcome  ok" in shown
