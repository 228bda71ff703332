"""measure=explain tells what a measurement would do, leaves no trace, and agrees with what a measurement then says."""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from cli import QUICK, REPOSITORY, TOY, environment, error_line, pi0exp, runs
from helpers import CPU, GROUPS_OF, lacking, plain_config, subject_of, with_option

from pi0exp import explain, known
from pi0exp.config import GROUPS, RunConfig
from pi0exp.explain import explain_point, outline
from pi0exp.known import Known, known_ceilings, same_point
from pi0exp.machine import Machine
from pi0exp.option import Numerics, Option, Requires
from pi0exp.point import experiment_of
from pi0exp.policy import Policy

EXPLAIN = ("measure.explain=true",)
TINY = ("model=tiny", "workload.num_steps=3", "measure=explain", "measure.device=cpu")


def told(capsys, tmp_path, *words: str) -> tuple[dict, str]:
    """What explain_point returns and prints, with a store that is not there."""
    made = explain_point(plain_config(*TINY, *words, f"track.root={tmp_path / 'none'}"))
    assert not (tmp_path / "none").exists()
    return made, capsys.readouterr().out


def lines_of(text: str, name: str) -> list[str]:
    """The lines of one name, and those that go on with it."""
    found: list[str] = []
    for line in text.splitlines():
        head, rest = line[:13].strip(), line[15:]
        if head == name or (found and not head and line.strip()):
            found.append(rest)
        elif found:
            break
    return found


# ---- what the options do


def runnable() -> list[tuple[str, str]]:
    """The options that a CPU can run alone."""
    options = [(group, name) for group in GROUPS for name in GROUPS_OF[group]]
    return [(group, name) for group, name in options if not lacking(group, name)]


@pytest.mark.parametrize("model", ["tiny", "tiny_pi05"])
@pytest.mark.parametrize(("group", "name"), runnable())
def test_outline_is_what_a_real_build_says(group: str, name: str, model: str):
    """Slot by slot: the model without numbers is changed as the one that is measured."""
    subject = subject_of(f"model={model}", f"{group}={name}")
    assert outline(subject) == subject.policy(CPU).applied


def test_outline_of_a_stack_with_options_of_single_stages():
    words = ("attention=sdpa", "attention.prefill=eager", "image_masking=skip", "precision=fp32")
    subject = subject_of("model=tiny", *words)
    done = outline(subject)
    assert done == subject.policy(CPU).applied
    assert [line.split(":")[0] for line in done["attention"]] == ["vision", "denoise"]


def test_option_that_cannot_run_here_tells_its_slots_all_the_same():
    done = outline(subject_of("model=tiny", "attention=sdpa", "compile_mode=default", "graphs=manual"))
    assert done["graphs"] == ["sample_actions -> one captured graph a structure"]
    assert any("torch.compile" in line for line in done["compile_mode"])
    assert done["attention"][0].startswith("vision: 2 Attention.attend -> ")


@dataclass(frozen=True)
class Importing(Option):
    """Needs a package that is not there, and finds out when it is applied, half way."""

    requires: ClassVar[Requires] = Requires(vendors=("amd",), packages=("no-such-package",))
    numerics = Numerics.APPROXIMATE
    bound = 0.25

    def apply(self, policy: Policy) -> None:
        policy.note("half of it")
        import no_such_package  # noqa: F401


@dataclass(frozen=True)
class Reading(Option):
    """Looks at the values of a weight, which a model without numbers does not have."""

    def apply(self, policy: Policy) -> None:
        policy.note(f"mean {policy.model.action_in_proj.weight.mean().item()}")


def test_option_that_cannot_be_applied_is_left_out():
    subject = with_option(subject_of("model=tiny", "attention=sdpa"), fusion=Importing(), graphs=Reading())
    done = outline(subject)
    assert done["fusion"] == ["cannot be applied here: ModuleNotFoundError: No module named 'no_such_package'"]
    [line] = done["graphs"]
    assert line.startswith("cannot be applied here: ")
    assert len(done["attention"]) == 3, "the others are told as if it were not there"


@dataclass(frozen=True)
class Clashing(Option):
    def clashes(self, stack: object) -> list[str]:
        return ["cannot stand beside a toy"]


def explained(monkeypatch, capsys, subject, tmp_path) -> tuple[dict, str]:
    monkeypatch.setattr(explain, "subject", lambda plain: subject)
    return told(capsys, tmp_path)


def test_needs_clashes_and_numerics_are_told(monkeypatch, capsys, tmp_path):
    subject = with_option(subject_of("model=tiny"), fusion=Importing(), graphs=Clashing())
    made, text = explained(monkeypatch, capsys, subject, tmp_path)
    assert made["exit_code"] == 0
    needs = lines_of(text, "can run")
    assert needs[0] == "no"
    assert [need.startswith("fusion: needs ") for need in needs[1:]] == [True, True]
    assert lines_of(text, "excluded") == ["graphs: cannot stand beside a toy"]
    assert made["reasons"] == [*needs[1:], "graphs: cannot stand beside a toy"]
    assert lines_of(text, "numerics") == ["APPROXIMATE: other maths on purpose, relative L2 error at most 0.25"]
    assert lines_of(text, "fusion")[0].startswith("APPROXIMATE: cannot be applied here: ")
    assert lines_of(text, "attention") == ["EXACT: leaves the model as it is"]


def test_words_of_single_stages_are_told_apart(capsys, tmp_path):
    _, text = told(capsys, tmp_path, "attention.denoise=sdpa")
    [line] = lines_of(text, "attention")
    assert line.startswith("EXACT, denoise REORDERED: denoise: 3 Attention.attend -> ")


def test_environment_is_left_alone(monkeypatch):
    """A variable that an option sets for its library would otherwise reach the processes of later points."""
    import os

    @dataclass(frozen=True)
    class Setting(Option):
        def apply(self, policy: Policy) -> None:
            os.environ["PI0EXP_TOY"] = "set"
            policy.note("a variable")

    subject = with_option(subject_of("model=tiny"), graphs=Setting())
    assert outline(subject)["graphs"] == ["a variable"]
    assert "PI0EXP_TOY" not in os.environ


# ---- work and floor


def test_work_and_floor_of_the_first_light_results(monkeypatch, capsys, tmp_path):
    """The floor is the very number that the committed measurement of this workload carries."""
    monkeypatch.setattr(known, "RESULTS", known.RESULTS / "first_light")
    known._files.cache_clear()
    plain = plain_config("attention=sdpa", "graphs=manual", "measure=explain", f"track.root={tmp_path / 'none'}")
    made = explain_point(plain)
    text = capsys.readouterr().out
    work = lines_of(text, "work")
    assert [line.split()[0] for line in work] == ["vision", "prefill", "denoise"]
    assert "10 times" in work[2]
    known._files.cache_clear()
    path = known.RESULTS / "nvidia-h200" / "74fbf16b538c29e9.json"
    metrics = json.loads(path.read_text())["metrics"]
    ceilings = known_ceilings([Known("x", json.loads(path.read_text()))], Machine(), {"precision": plain["precision"]})
    assert ceilings is not None
    assert ceilings[0].bytes_per_s == pytest.approx(1e12 * metrics["ceilings/copy_tb_per_s"])
    subject = subject_of("attention=sdpa", "graphs=manual")
    floor = sum(explain.floor_ms(subject.work(), ceilings[0]).values())
    assert floor == pytest.approx(metrics["roofline/floor_ms"])
    assert "NVIDIA H200" in " ".join(lines_of(text, "floor"))
    assert made["explained"]["floor_ms"] == pytest.approx(floor, rel=0.1), "another run's ceilings, a few per cent off"


def test_no_ceilings_no_floor(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(known, "RESULTS", tmp_path / "nothing")
    known._files.cache_clear()
    made, text = told(capsys, tmp_path)
    known._files.cache_clear()
    assert lines_of(text, "floor") == ["unknown: no GPU's ceilings have been measured in this precision"]
    assert made["explained"]["floor_ms"] is None
    assert len(lines_of(text, "work")) == 3


def entry(gpu: str, precision: str, rate: float | None, date: str = "2026-01-01", **more) -> Known:
    metrics = {} if rate is None else {"ceilings/copy_tb_per_s": rate, "ceilings/matrix_tflop_per_s": 100 * rate}
    record = {"metrics": metrics, "experiment": {"precision": precision}, "fingerprint": {"gpu": gpu, "date": date}}
    return Known(gpu, record | more)


def test_ceilings_are_of_this_gpu_and_this_precision_if_there_are_any():
    records = [entry("B", "bf16", None), entry("B", "fp32", 1.0), entry("A", "bf16", 2.0), entry("B", "bf16", 3.0)]

    def chosen(gpu: str, precision: str = "bf16") -> float | None:
        found = known_ceilings(records, Machine(gpu=gpu), {"precision": precision})
        return None if found is None else found[0].bytes_per_s / 1e12

    assert chosen("B") == 3.0
    assert chosen("A") == 2.0
    assert chosen("CPU") == 2.0, "the first of any"
    assert chosen("A", "fp32") == 1.0
    assert chosen("A", "fp8") is None


# ---- what is measured


def test_same_point_whatever_the_protocol():
    quick = experiment_of(plain_config("model=tiny", "measure=quick"))
    others = [experiment_of(plain_config("model=tiny", word)) for word in ("workload.seed=1", "attention=sdpa")]
    records = [Known(str(i), {"experiment": found}) for i, found in enumerate([quick, *others])]
    asked = experiment_of(plain_config("model=tiny", "measure=explain"))
    assert [known.where for known in same_point(records, asked)] == ["0"]


def test_studies_of_the_repository_are_looked_into(tmp_path):
    assert known.store_exists(None, tmp_path) is False
    assert known.store_exists(f"sqlite:///{tmp_path}/other.db", None) is False
    assert known.store_exists("http://host:5000", None) is True
    found = known.known_records(RunConfig())
    dates = [one.date for one in found]
    assert dates == sorted(dates, reverse=True)
    assert {one.record["study"] for one in found} >= {"first_light", "adhoc"}


def test_a_damaged_result_file_is_told_and_left_out(monkeypatch, capsys, tmp_path):
    good = known.RESULTS / "first_light" / "nvidia-h200" / "74fbf16b538c29e9.json"
    place = tmp_path / "first_light" / "nvidia-h200"
    place.mkdir(parents=True)
    (place / good.name).write_bytes(good.read_bytes())
    (place / "half.json").write_bytes(good.read_bytes()[:3000])
    monkeypatch.setattr(known, "RESULTS", tmp_path)
    found = known.known_records(RunConfig())
    assert [one.record["key"] for one in found if one.record["study"] == "first_light"] == [good.stem]
    assert f"left out: {place / 'half.json'}: not a whole result file" in capsys.readouterr().err


@pytest.mark.slow
def test_explained_measured_explained(tmp_path):
    """Nothing is there before and nothing is left; then the point is measured; then its time is told."""
    words = (*QUICK, "workload.num_steps=3")
    before = pi0exp(tmp_path, *words, *EXPLAIN, store=False)
    assert (before.returncode, before.stderr) == (0, "")
    assert "measured  not by this code on this machine" in before.stdout
    assert not (tmp_path / "mlflow.db").exists()
    assert pi0exp(tmp_path, *words).returncode == 0
    [run] = runs(tmp_path)
    after = pi0exp(tmp_path, *words, *EXPLAIN)
    p50 = run.data.metrics["latency_ms/p50"]
    assert f"measured  ok, p50 {p50:.2f} ms (CPU, " in after.stdout
    assert f"measure=quick; study adhoc, run {run.info.run_id})" in after.stdout
    other = pi0exp(tmp_path, *words, "workload.seed=1", *EXPLAIN)
    assert "measured  not by this code on this machine" in other.stdout
    assert len(runs(tmp_path)) == 1


# ---- the command


def test_sweep_has_a_row_a_point(tmp_path):
    words = ("model=tiny", "measure=explain", "measure.device=cpu", "-m", "attention=eager,sdpa", "graphs=none,manual")
    done = pi0exp(tmp_path, *words, store=False)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = [line.split() for line in done.stdout.split("#  attention")[1].splitlines()]
    assert head == ["graphs", "numerics", "floor", "ms", "p50", "ms", "can", "run"]
    points = [row for row in rows if row[:1] in (["0"], ["1"], ["2"], ["3"])]
    assert [row[1:4] for row in points] == [
        ["eager", "none", "EXACT"],
        ["eager", "manual", "EXACT"],
        ["sdpa", "none", "REORDERED"],
        ["sdpa", "manual", "REORDERED"],
    ]
    assert [row[6] for row in points] == ["yes", "no:", "yes", "no:"]
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["measure=explain", "model=tiny", "model.checkpoint=no/such/place"], "no/such"),
        pytest.param(["measure=explain", "workload.batch_size=0"], "batch_size is 0", marks=pytest.mark.slow),
        pytest.param([*QUICK, "measure.explain=perhaps"], "measure.explain: ", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_still_refused(tmp_path, words, cause):
    assert cause in error_line(pi0exp(tmp_path, *words))


def test_subject_that_is_no_policy(tmp_path):
    done = pi0exp(tmp_path, *TOY, *EXPLAIN, "~model", "~workload", "+subject.fault=unmet")
    assert (done.returncode, done.stderr) == (0, "")
    assert lines_of(done.stdout, "can run") == ["no", "it is not supported anywhere"]
    assert lines_of(done.stdout, "work") == []


def test_full_size_takes_no_memory(tmp_path):
    """Pi0 has 3 billion parameters, 7 GB of them; the process that tells of it is allowed 3 GB of data."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30));"
        f"sys.argv = ['pi0exp', 'measure=explain', 'attention=sdpa', 'track.root={tmp_path}'];"
        "from pi0exp.__main__ import main; main()"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment(tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "27 Attention.attend" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20


def test_a_record_without_a_newer_switch_is_of_the_same_point():
    plain = plain_config("stack=2_sdpa")
    experiment = experiment_of(plain)
    older = json.loads(json.dumps(experiment))
    del older["fusion"]["patches"]
    other = json.loads(json.dumps(experiment))
    other["fusion"]["patches"] = True
    records = [Known("a file", {"experiment": one}) for one in (older, other)]
    assert list(same_point(records, experiment)) == records[:1]
