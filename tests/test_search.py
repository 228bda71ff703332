"""study=search: its space, what narrows it, what is proposed and never the best, with made-up measurements."""

import pytest
from helpers import plain_config
from search_fakes import CPU, H200, Log, composed_once, cost_ms, measured, space_of

from pi0exp import compose, config
from pi0exp.errors import UserError
from pi0exp.point import experiment_of
from pi0exp.search import loop
from pi0exp.search.narrow import narrowed
from pi0exp.search.settings import Objective, SearchConfig
from pi0exp.search.trial import counted

pytest.importorskip("optuna", reason="the extra `search` is not installed")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    composed_once(monkeypatch)


@pytest.fixture(scope="module")
def cpu():
    return space_of()


@pytest.fixture(scope="module")
def h200():
    return space_of(machine=H200)


def row_of(space, *words):
    row = space.row_of(plain_config("model=tiny", *words))
    assert isinstance(row, dict), row
    return row


# ---- the space


def test_space_has_what_the_machine_can_run(cpu, h200):
    assert cpu.factors["attention.denoise"] == ("eager", "sdpa")
    assert cpu.factors["graphs"] == ("none",)
    assert set(h200.factors["attention.prefill"]) == {"eager", "sdpa", "triton"}
    assert set(h200.factors["gemm.vision"]) == {"blas", "cublas", "cublaslt", "lt_tuned", "triton", "tunable"}
    assert set(h200.factors["fusion"]) == {"none", "projections", "kernels", "blocks", "hopper"}
    assert h200.factors["compile_mode.region"] == ("stage", "block")
    assert {f"fusion.rewrites.{name}" for name in plain_config()["fusion"]["rewrites"]} <= set(h200.factors)
    assert "needs a GPU of amd" in h200.left_out["attention=aiter"][0]


def test_space_has_nothing_approximate(h200):
    assert h200.factors["image_masking"] == ("keep", "skip")
    assert "APPROXIMATE" in h200.left_out["image_masking=ignore"][0]
    wide = space_of("precision=bf16,fp32", machine=H200)
    assert wide.factors["precision"] == ("bf16", "fp32")
    with pytest.raises(UserError, match=r"precision=fp8 can be no part of a search here: .*APPROXIMATE"):
        space_of("precision=bf16,fp8", machine=H200)


@pytest.mark.parametrize("stack", ["0_eager", "7_hoists", "8_compiled", "9_blocks", "fork_best_masked", "h200_best"])
def test_words_of_a_named_stack_are_the_same_point(stack, h200):
    row = row_of(h200, f"stack={stack}")
    plain = plain_config("model=tiny", *h200.words(row))
    assert h200.stack(row) == config.stack(plain)
    assert experiment_of(plain) == experiment_of(plain_config("model=tiny", f"stack={stack}"))
    assert h200.excluded(row) == []


def test_stages_are_said_in_the_fewest_words(h200):
    row = row_of(h200, "attention=triton", "attention.prefill=sdpa", "gemm=blas", "gemm.denoise=triton")
    words = [word for word in h200.words(row) if word.startswith(("attention", "gemm"))]
    assert words == ["gemm=blas", "gemm.denoise=triton", "attention=triton", "attention.prefill=sdpa"]
    assert h200.stack(row) == config.stack(plain_config(*h200.words(row)))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["compile_mode=reduce_overhead", "graphs=manual"], "captures twice"),
        (["fusion=blocks", "gemm=triton"], "gemm.denoise must be blas"),
        (["gemm=tunable", "fusion.rewrites.cache_room=true"], "TunableOp reads beyond"),
        (["compile_mode=max_autotune"], "longer than a trial may"),
        (["fusion=none", "compile_mode=max_autotune", "compile_mode.region=block"], ""),
    ],
)
def test_what_excludes_each_other_is_told_without_a_child(words, reason, h200):
    reasons = h200.excluded(row_of(h200, *words))
    assert reason in " ".join(reasons)
    assert bool(reason) == bool(reasons)


def test_stack_outside_of_the_space_says_why(cpu):
    assert "graphs=manual needs a GPU" in cpu.row_of(plain_config("stack=1_graphs"))


# ---- what the command line leaves of it


def test_words_narrow_the_space():
    left = space_of("attention=sdpa", "attention.denoise=eager,sdpa", "fusion.rewrites.fold_norms=false")
    assert left.factors["attention.vision"] == ("sdpa",)
    assert left.factors["attention.denoise"] == ("eager", "sdpa")
    assert left.factors["fusion.rewrites.fold_norms"] == ("false",)
    assert "attention.vision" not in left.open
    assert space_of("compile_mode=none").factors["compile_mode.region"] == ("stage",)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("graphs=manual", "graphs=manual can be no part of a search here: needs a GPU"),
        ("attention=flsh", "attention.vision=flsh: no such choice; there are eager, sdpa"),
        ("graphs=split,nothing", "graphs=split can be no part"),
        ("gemm.library=cublas", "would hold for every point of study=search, which varies gemm itself"),
        ("fusion.qkv=true", "it can be told fusion, fusion.rewrites.trim_prompt"),
        ("stack=2_sdpa", "search.stacks names those to begin with"),
        ("workload=default,masked", "one search is of one workload; start a command for each"),
    ],
)
def test_words_that_cannot_narrow_are_refused(word, told):
    with pytest.raises(UserError) as caught:
        space_of(word)
    assert told in str(caught.value)


def test_other_words_hold_for_every_point():
    with compose.session():
        left = narrowed(["study=search", "workload=masked", "precision=fp32", "search.seed=3", "graphs=none"])
    assert left.base == ["study=search", "workload=masked", "precision=fp32"]
    assert left.search == ["search.seed=3"]
    assert left.choices == {"graphs": ["none"]}


# ---- the search


def searched(space, rule, n_trials=12, **values):
    log = Log(rule)
    named = [loop.Named("0_eager", tuple(space.words(row)), row) for row in [row_of(space, "stack=0_eager")]]
    return loop.search(space, named, SearchConfig(n_trials=n_trials, **values), log), log


def test_named_stacks_come_first_and_no_stack_twice(cpu):
    found, log = searched(cpu, lambda words: measured(cost_ms(words)), n_trials=25)
    assert [trial.name for trial in found.trials].index("0_eager") == 0
    assert len(found.trials) == len(set(log.asked)) == 25
    assert found.ended == ""
    best = min(found.trials, key=lambda trial: trial.metrics["latency_ms/p50"])
    assert best.metrics["latency_ms/p50"] < 80, "it learns"


def test_same_seed_and_results_propose_the_same(cpu):
    runs = [searched(cpu, lambda words: measured(cost_ms(words)), n_trials=15)[1].asked for _ in range(2)]
    assert runs[0] == runs[1]
    assert searched(cpu, lambda words: measured(cost_ms(words)), n_trials=15, seed=1)[1].asked != runs[0]


def test_what_is_not_ok_or_approximate_is_infeasible(cpu):
    def rule(words):
        if "attention.denoise=sdpa" in words or "attention=sdpa" in words:
            return measured(1.0, numerics="APPROXIMATE")
        return measured(2.0, outcome="wrong_numerics") if "image_masking=skip" in words else measured(cost_ms(words))

    found, _ = searched(cpu, rule, n_trials=20)
    objectives = SearchConfig().objectives
    ends = {trial.infeasible(objectives) for trial in found.trials}
    assert ends == {"", "APPROXIMATE", "wrong_numerics"}
    assert all(trial.metrics["latency_ms/p50"] > 2 for trial in found.trials if not trial.infeasible(objectives))
    assert "APPROXIMATE" in counted(found.trials, objectives)


def test_a_point_without_its_energy_is_infeasible(cpu):
    found, _ = searched(cpu, lambda words: measured(cost_ms(words)), n_trials=3, objectives=tuple(Objective))
    assert {trial.infeasible(tuple(Objective)) for trial in found.trials} == {"ok without energy_j/call"}


def test_what_excludes_itself_is_no_point(h200):
    found, log = searched(h200, lambda words: measured(cost_ms(words)), n_trials=15)
    assert len(found.excluded) > 5
    assert len(log.asked) == 15
    for trial in found.trials:
        assert h200.excluded(row_of(h200, *trial.words)) == []


def test_small_space_ends_the_search_early(monkeypatch):
    monkeypatch.setattr(loop, "FREE", 20)
    rewrites = [f"fusion.rewrites.{name}=false" for name in plain_config()["fusion"]["rewrites"]]
    small = space_of("compile_mode=none", "fusion=none", "attention=eager", *rewrites)
    assert small.size == 2
    found, log = searched(small, lambda words: measured(cost_ms(words)))
    assert len(log.asked) == 2
    assert "20 proposals in a row were known or excluded" in found.ended
    assert small.machine == CPU
