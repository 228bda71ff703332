"""Which points a study has; what a command line may add to it, and what it may not."""

from pathlib import Path

import pytest

from pi0exp import compose, sweep
from pi0exp.errors import UserError

STACKS = {
    "low": "defaults:\n  - override /attention: eager\n  - override /graphs: none\n",
    "mid": "defaults:\n  - low\n  - override /fusion: projections\nfusion:\n  rewrites:\n    hoist_time: true\n",
    "high": "defaults:\n  - mid\n  - _self_\nfusion: {rewrites: {fold_norms: true}}\nattention.denoise: sdpa\n",
}


@pytest.fixture(autouse=True)
def stacks(tmp_path, monkeypatch):
    """Only these three stacks."""
    files: dict[str, Path] = {}
    for name, text in STACKS.items():
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(f"# @package _global_\n{text}")
    monkeypatch.setattr(compose, "files", lambda: {"stack": files})


def check(*words: str, swept: str | None = "low,high", points: tuple[str, ...] = ()) -> None:
    """check_arguments of such a command line; a session, since Hydra parses what is swept."""
    params = {} if swept is None else {"stack": swept, "workload.seed": "0,1"}
    with compose.initialize_config_dir(str(compose.CONF), version_base="1.3"):
        sweep.check_arguments("toy", params, points, ["study=toy", *words])


def expand(params: dict[str, str], points: list[str], *words: str) -> list[str]:
    with compose.initialize_config_dir(str(compose.CONF), version_base="1.3"):
        return [" ".join(point) for point in sweep.expanded(params, points, words)]


def test_points_are_all_lines_beside_all_combinations():
    assert expand({}, []) == [""]
    assert expand({"a": "1,2", "b": "3,4"}, []) == ["a=1 b=3", "a=1 b=4", "a=2 b=3", "a=2 b=4"]
    assert expand({"a": "1,2"}, ["", "c=5 d=6", "e='{f: 7}'"]) == [
        *("a=1", "a=1 c=5 d=6", "a=1 e={f:7}"),
        *("a=2", "a=2 c=5 d=6", "a=2 e={f:7}"),
    ]
    assert expand({}, ["a=1 b=2,3", "a=4"]) == ["a=1 b=2", "a=1 b=3", "a=4"]


def test_words_of_the_command_line_hold_for_all_points_and_narrow_a_parameter():
    assert expand({"a": "1,2,3"}, ["b=1", "b=2"], "c=0", "a=2") == ["a=2 c=0 b=1", "a=2 c=0 b=2"]
    assert expand({"a": "1,2,3"}, [], "a=2,3") == ["a=2", "a=3"]


@pytest.mark.parametrize("word", ["graphs=manual", "compile_mode.region=block", "fusion.rewrites={fold_norms: true}"])
def test_what_the_lines_vary_is_refused(word: str):
    points = ("graphs=none,manual", "compile_mode.region=stage fusion.rewrites.fold_norms=true")
    with pytest.raises(UserError, match="would hold for every point of study=toy, which varies"):
        check(word, swept=None, points=points)
    check("attention=eager", "workload.horizon=5", swept=None, points=points)


def test_a_parameter_may_be_narrowed_and_not_replaced_by_what_holds_it():
    check("workload.seed=1", "stack=low")
    with pytest.raises(UserError, match=r"which varies workload\.seed itself"):
        check("workload.seed.deeper=1")


def test_stacks_of_lines_count_too():
    with pytest.raises(UserError, match="for every stack of study=toy, which varies graphs itself"):
        check("graphs=manual", swept=None, points=("stack=low", "stack=high"))


def test_stack_sets_what_it_builds_on_too():
    assert sweep.stack_keys("low") == {"attention", "graphs"}
    assert sweep.stack_keys("high") == {
        "attention",
        "graphs",
        "fusion",
        "fusion.rewrites.hoist_time",
        "fusion.rewrites.fold_norms",
        "attention.denoise",
    }


@pytest.mark.parametrize(
    ("word", "theirs"),
    [
        ("graphs=manual", "graphs"),
        ("fusion=none", "fusion"),
        ("fusion.rewrites.hoist_time=false", "fusion.rewrites.hoist_time"),
        ("fusion.rewrites={hoist_time: false}", "fusion.rewrites.fold_norms"),
        ("attention.denoise={name: sdpa}", "attention.denoise"),
        ("attention.denoise.backend=math", "attention.denoise"),
        ("+fusion.rewrites.fold_norms=true", "fusion.rewrites.fold_norms"),
    ],
)
@pytest.mark.parametrize("swept", ["low,high", "choice(low,high)"])
def test_what_the_stacks_vary_is_refused(word: str, theirs: str, swept: str):
    with pytest.raises(UserError, match=f"would hold for every stack of study=toy, which varies {theirs} itself"):
        check(word, swept=swept)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model=tiny", "workload.seed=3"],
        ["graphs.warmup=5", "attention.backend=math"],
        ["fusion.qkv=true", "fusion.rewrites.trim_prompt=true"],
        ["compile_mode=default", "attention.prefill=eager"],
    ],
)
def test_what_the_stacks_leave_alone_may_be_set(words: list[str]):
    check(*words)


def test_one_stack_counts_alone():
    check("fusion=none", swept="low")
    check("fusion=none", "stack=low")  # narrowed to it
    with pytest.raises(UserError, match="varies fusion itself"):
        check("fusion=none", swept="mid")


def test_stack_that_is_not_there_is_named():
    with pytest.raises(UserError, match="stack=none_such: no such stack; there are low, mid, high"):
        check(swept="none_such")
