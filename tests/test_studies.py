"""What a command line may add to a study of named stacks, and what it may not."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pi0exp import compose
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


def check(*words: str, swept: str = "low,high", study: str = "toy") -> None:
    """check_study with what Hydra tells of such a command line; a session, since Hydra parses what is swept."""
    node = SimpleNamespace(
        runtime=SimpleNamespace(choices={"study": study, "attention": "sdpa"}),
        overrides=SimpleNamespace(task=[f"study={study}", *words]),
        sweeper=SimpleNamespace(get=lambda name: {"stack": swept}),
    )
    with compose.initialize_config_dir(str(compose.CONF), version_base="1.3"):
        compose.check_study(node)


def test_stack_sets_what_it_builds_on_too():
    assert compose._stack_keys("low") == {"attention", "graphs"}
    assert compose._stack_keys("high") == {
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
    with pytest.raises(UserError, match="varies fusion itself"):
        check("fusion=none", swept="mid")


def test_stack_that_is_not_there_is_named():
    with pytest.raises(UserError, match="stack=none_such: no such stack; there are low, mid, high"):
        check(swept="none_such")


def test_other_runs_are_not_asked(monkeypatch):
    monkeypatch.setattr(compose, "files", None)
    node = SimpleNamespace(runtime=SimpleNamespace(choices={"graphs": "none"}), sweeper={"params": None})
    compose.check_study(node)
