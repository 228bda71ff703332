"""study=search: the closing comparison, the Pareto front and the file that is left, with made-up measurements."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import plain_config
from omegaconf import OmegaConf
from search_fakes import CPU, H200, Log, composed_once, cost_ms, measured, space_of

from pi0exp import compose, config, outcomes
from pi0exp.errors import UserError
from pi0exp.experiments.tables import conf
from pi0exp.search import closing, stack_file
from pi0exp.search.loop import Named
from pi0exp.search.plan import Plan
from pi0exp.search.run import run
from pi0exp.search.settings import Objective, SearchConfig
from pi0exp.search.trial import Trial
from pi0exp.whole import write_whole

pytest.importorskip("optuna", reason="the extra `search` is not installed")

BOTH = tuple(Objective)
ASKED = "objectives=latency model=tiny workload=default"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    composed_once(monkeypatch)
    monkeypatch.setattr(outcomes, "POINTS", [])


@pytest.fixture(scope="module")
def space():
    return space_of("compile_mode=none")


def planned(space, path=None, standing=None, **values):
    row = space.row_of(plain_config("model=tiny"))
    named = [Named("0_eager", tuple(space.words(row)), row)]
    settings = SearchConfig(**{"n_trials": 12} | values)
    return Plan(settings, ["study=search"], 0, space, named, {}, standing, path, "a reason", ASKED, explain=False)


def searched(plan, rule) -> Log:
    """Run it; points go where those of a run go."""
    log = Log(rule)

    def point(words):
        outcomes.POINTS.append(log(words) | {"sweep": True})
        return outcomes.POINTS[-1]

    run(plan, point, "python -m pi0exp study=search")
    return log


def trial(name: str, *values: float) -> Trial:
    return Trial((f"graphs={name}",), measured(*values), name if name[0] == "n" else "")


# ---- the closing comparison


def test_candidates_are_the_best_and_the_best_named_stack():
    trials = [trial("n1", 9.0), trial("n2", 8.0), *(trial(f"t{i}", float(i)) for i in range(1, 6))]
    labels = [one.words[0] for one in closing.candidates(trials, SearchConfig())]
    assert labels == ["graphs=t1", "graphs=t2", "graphs=t3", "graphs=n2"]
    assert len(closing.candidates([trial("n1", 0.5), *trials], SearchConfig())) == 3, "a named one is among the best"
    bad = Trial(("graphs=none",), measured(0.1, numerics="APPROXIMATE"))
    assert closing.candidates([bad], SearchConfig()) == []


def test_candidates_of_two_objectives_are_along_the_front():
    front = [trial(f"t{i}", float(i), 10.0 - i) for i in range(1, 8)]
    worse = [trial("n1", 9.0, 9.5), trial("x", 8.0, 8.0)]
    made = closing.candidates([*worse, *front], SearchConfig(objectives=BOTH))
    assert [one.words[0] for one in made] == ["graphs=t1", "graphs=t4", "graphs=t7", "graphs=n1"]
    assert closing.front([*worse, *front], BOTH) == front


def test_only_the_closing_measurements_decide(space, tmp_path):
    """The luckiest point of the search is slow when it is measured again."""
    lucky = []

    def rule(words):
        if not lucky and "image_masking=skip" in words:
            lucky.append(words)
        return measured(1.0 if [words] == lucky else cost_ms(words))

    log = searched(planned(space, tmp_path / "best.yaml"), rule)
    again = [words for words in log.asked if "workload.seed=1" in words]
    assert 2 <= len(again) <= 4
    assert again[0].startswith(lucky[0]), "it was the best of the search"
    text = (tmp_path / "best.yaml").read_text()
    first, *others = [cost_ms(words) for words in again]
    assert f"this stack: p50 {min(first, *others):.3f} ms" in text


def test_each_is_measured_in_turns_as_often_as_asked(space):
    log = searched(planned(space, candidates=2, repeats=2), lambda words: measured(cost_ms(words)))
    seeds = [words.rpartition("workload.seed=")[2] for words in log.asked if "workload.seed=" in words]
    assert seeds == ["1"] * (len(seeds) // 2) + ["2"] * (len(seeds) // 2)
    assert len(seeds) in (4, 6)


def test_named_stack_wins_where_nothing_is_faster(space, tmp_path, capsys):
    plain = " ".join(plain_words(space))
    searched(planned(space, tmp_path / "best.yaml"), lambda words: measured(5.0 if words.startswith(plain) else 50.0))
    assert "No stack that was found is faster than the named one" in capsys.readouterr().out
    assert "the options of `0_eager`" in (tmp_path / "best.yaml").read_text()


def plain_words(space):
    return space.words(space.row_of(plain_config("model=tiny")))


def test_result_of_before_takes_part(space, tmp_path):
    row = space.row_of(plain_config("model=tiny", "attention=sdpa", "attention.vision=eager"))
    standing = Named("best_toy", tuple(space.words(row)), row)
    log = searched(planned(space, tmp_path / "b.yaml", standing, n_trials=2), lambda words: measured(cost_ms(words)))
    assert any(words == " ".join([*standing.words, "workload.seed=1"]) for words in log.asked)


def test_pareto_front_is_shown_and_written(space, tmp_path, capsys):
    def rule(words):
        ms = cost_ms(words)
        return measured(ms, 1000 / ms)

    searched(planned(space, tmp_path / "best.yaml", objectives=BOTH), rule)
    out, text = capsys.readouterr().out, (tmp_path / "best.yaml").read_text()
    assert "Pareto front of latency (ms) and energy (J)" in out
    marked = [line for line in out.splitlines() if line.startswith("*  ")]
    assert len(marked) >= 2, "no point of this rule dominates another"
    assert text.count("# - p50 ") == len(marked)
    assert " J a call" in text
    assert "The fastest of the Pareto front" in text


def test_nothing_ok_writes_nothing_and_keeps_the_exit_codes(space, tmp_path, capsys):
    searched(planned(space, tmp_path / "best.yaml", n_trials=3), lambda words: measured(1.0, outcome="error"))
    assert not (tmp_path / "best.yaml").exists()
    assert "no point of the search is ok" in capsys.readouterr().out
    assert outcomes.exit_code() == 5


def test_failed_trials_do_not_fail_the_search(space, tmp_path):
    def rule(words):
        return measured(3.0, outcome="timeout") if "attention=sdpa" in words else measured(cost_ms(words))

    searched(planned(space, tmp_path / "best.yaml"), rule)
    assert {point["outcome"] for point in outcomes.POINTS} == {"ok", "timeout"}
    assert outcomes.exit_code() == 0
    assert "12 points" in (text := (tmp_path / "best.yaml").read_text())
    assert " timeout)" in text
    assert outcomes.closing("search", outcomes.POINTS, explained=False).endswith("complete")


# ---- the file


def test_file_composes_to_the_stack_that_won(tmp_path):
    space = space_of(machine=H200)
    words = ["attention=triton", "attention.prefill=sdpa", "compile_mode=default", "compile_mode.region=block"]
    row = space.row_of(plain_config("stack=h200_best", *words, "fusion.rewrites.hoist_time=false"))
    file = tmp_path / "stack" / "best_toy.yaml"
    write_whole(file, stack_file.text(space.words(row), "The fastest.", ["when: today", "a " * 90], ASKED).encode())
    made = compose.from_words([f"hydra.searchpath=[file://{tmp_path}]", "stack=best_toy"])
    assert config.stack(made) == space.stack(row)
    assert conf.comment(file) == "The fastest", "what tables of stacks show"
    assert all(len(line) <= 120 for line in file.read_text().splitlines())
    assert oct(file.stat().st_mode & 0o777) == "0o644"


def test_stack_with_settings_of_its_own_builds_on_its_name():
    assert OmegaConf.create(stack_file.text(["stack=layers_flash"], "x", [], ASKED)).defaults == ["layers_flash"]


def test_file_says_where_it_comes_from(space, tmp_path):
    searched(planned(space, tmp_path / "best.yaml"), lambda words: measured(cost_ms(words)))
    text = (tmp_path / "best.yaml").read_text()
    for part in (
        "2026-11-25, Toy GPU, torch 2.13, commit c0ffee",
        "# command: python -m pi0exp study=search",
        "# search: 12 points (12 ok), seed 0",
        "# runner-up: ",
        "# best named stack: 0_eager: p50 100.000 ms (99.000 to 101.000 at 95 %), key ",
        "# error of the actions: rel L2 7.00e-03 (plain bf16 7.20e-03), declared REORDERED",
        f"# asked: {ASKED}",
    ):
        assert part in text


def target(write, machine, *words):
    return stack_file.target(write, machine, plain_config(*words))


def test_result_goes_where_it_was_told(tmp_path):
    name = "best_nvidia-h200.yaml"
    assert target("conf", H200, "model=pi0") == (compose.CONF / "stack" / name, "")
    assert target("conf", H200, "model=pi05")[0] == compose.CONF / "stack" / name
    assert target("conf", H200, "model=tiny")[0] is None
    assert "reduced model" in target("conf", H200, "model=pi0", "model.vision.depth=2")[1]
    path, why = target("conf", CPU, "model=tiny")
    assert path is None
    assert why.startswith("this is no GPU and this is a reduced model")
    assert target(str(tmp_path), CPU) == (tmp_path / "stack" / "best_cpu.yaml", "")
    assert target("a/b.yaml", CPU) == (Path("a/b.yaml"), "")
    assert target(None, H200)[0] is None


def test_place_that_cannot_be_written_is_told_before(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/stack: Not a directory; choose another place for the result with"):
        stack_file.check(tmp_path / "file" / "stack" / "best.yaml", ASKED)


def test_result_of_another_question_is_not_replaced(tmp_path):
    file = tmp_path / "best.yaml"
    stack_file.check(file, ASKED)
    file.write_text("# @package _global_\n")
    with pytest.raises(UserError, match="was not written by a search"):
        stack_file.check(file, ASKED)
    file.write_text(stack_file.text(["graphs=none"], "x", [], ASKED))
    stack_file.check(file, ASKED)
    with pytest.raises(UserError, match=f"answers '{ASKED}', and this search would replace it"):
        stack_file.check(file, ASKED + " more")


def test_how_to_run_it(tmp_path):
    assert stack_file.usage(compose.CONF / "stack" / "best_x.yaml") == "python -m pi0exp stack=best_x"
    assert stack_file.usage(tmp_path / "stack" / "b.yaml").endswith(f"--config-dir {tmp_path} stack=b")
    assert "copy it" in stack_file.usage(tmp_path / "b.yaml")


def test_explain_measures_the_named_stacks_in_no_way(space, capsys):
    log = Log(lambda words: {"outcome": "explained"})
    run(replace(planned(space), explain=True), log, "")
    assert log.asked == [" ".join(plain_words(space))]
    out = capsys.readouterr().out
    assert "attention.denoise: eager, sdpa" in out
    assert "measured first: stack=0_eager" in out
