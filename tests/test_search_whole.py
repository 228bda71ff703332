"""study=search whole, on the tiny model and a CPU: interrupted, gone on with, done again, and its stack used."""

import signal
from pathlib import Path

import pytest
from cli import QUICK, REPOSITORY, TESTS, error_line, pi0exp, runs, start

pytest.importorskip("optuna", reason="the extra `search` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SEARCH = ("study=search", *QUICK, "compile_mode=none", "search.n_trials=5", "search.candidates=2")


def test_search_is_interrupted_gone_on_with_and_repeated(tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    file, stacks = out / "stack" / "best_cpu.yaml", sorted((REPOSITORY / "conf" / "stack").iterdir())
    words = (*SEARCH, f"search.write={out}")

    process = start(root, *words)
    assert process.stderr is not None
    for line in process.stderr:
        if "search: point 3 of 5" in line:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not file.exists()
    ended = [run.data.tags["outcome"] for run in runs(root, "search")]
    assert ended[:2] == ["ok", "ok"]

    done = pi0exp(root, *words, timeout_s=900)
    assert done.returncode == 0, done
    assert done.stdout.count("already measured") == 2
    assert "study search: " in done.stdout.splitlines()[-1]
    assert done.stdout.splitlines()[-1].endswith("complete")
    settled = [run for run in runs(root, "search") if run.data.tags["outcome"] == "ok"]
    assert 7 <= len(settled) <= 8, "5 points; 2 candidates and perhaps the best named stack once more"
    assert {run.data.params["workload.seed"] for run in settled} == {"0", "1"}
    assert settled[0].data.params["attention"] == "eager", "stack=0_eager comes first"
    text = file.read_text()

    again = pi0exp(root, *words, timeout_s=900)
    assert again.returncode == 0, again
    assert again.stdout.count("already measured") == len(settled)
    assert len([run for run in runs(root, "search") if run.data.tags["outcome"] == "ok"]) == len(settled)
    assert file.read_text() == text
    assert sorted((REPOSITORY / "conf" / "stack").iterdir()) == stacks, "nothing goes into the repository"

    shown = pi0exp(root, *QUICK, "stack=best_cpu", "measure=explain", "--config-dir", str(out))
    assert shown.returncode == 0, shown
    assert "can run  yes" in shown.stdout
    assert "measured  ok, p50" in shown.stdout


def test_nothing_is_written_on_a_cpu_unless_it_is_told(tmp_path):
    told = pi0exp(tmp_path, *SEARCH, "search.n_trials=1", "search.candidates=1", "search.stacks=0_eager")
    assert told.returncode == 0, told
    assert "search: nothing is written: this is no GPU and this is a reduced model" in told.stderr
    assert "is written" not in told.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["search.n_trials=0"], "search.n_trials is 0; it must be 1 or more"),
        (["search.n_trial=5"], "there is no setting n_trial, n_trials perhaps"),
        (["search.objectives=latency,energy"], "needs a GPU, whose energy can be measured"),
        (["graphs=none,manual"], "graphs=manual can be no part of a search here: needs a GPU"),
        ([f"search.write={TESTS / 'cli.py'}/here"], "Not a directory; choose another place for the result"),
        (["search.write=conf/stack/2_sdpa.yaml"], "was not written by a search, and this search would replace it"),
    ],
)
def test_what_cannot_be_is_one_line_before_the_search(words, told, tmp_path):
    assert told in error_line(pi0exp(tmp_path, *SEARCH, *words, store=False))
    assert not list(tmp_path.glob("*.db")), "nothing was begun"


def test_without_optuna_it_says_how_to_install_it(tmp_path):
    Path(tmp_path, "broken").mkdir()
    Path(tmp_path, "broken", "optuna.py").write_text("raise ImportError('No module named optuna')\n")
    done = pi0exp(tmp_path / "runs", *SEARCH, PYTHONPATH=f"{tmp_path / 'broken'}:{TESTS}")
    assert error_line(done).endswith("pip install 'pi0exp[search]'")
    listed = pi0exp(tmp_path / "runs", "study=masking", *QUICK, "measure=explain", PYTHONPATH=str(tmp_path / "broken"))
    assert listed.returncode == 0, "nothing else needs it"
