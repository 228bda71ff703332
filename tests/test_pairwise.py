"""Every two choices that can stand together do stand together somewhere, and compute the same actions there.

The points are those of experiments/covering.py: few, and every pair of options occurs in one of them.
"""

import gc
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import built, plain_config, subject_of, traced

from pi0exp import compose, config
from pi0exp.config import GROUPS
from pi0exp.fusion.rewrites import Rewrites
from pi0exp.machine import Machine
from pi0exp.option import STAGES

HOST = Machine()
SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "covering.py"
MODELS = ["tiny", "tiny_pi05"]
FEW = ("workload.num_steps=2", "measure.device=cpu")
PARTS = 6
GENERATED = 7
"""Of so many compiled points one runs generated code, which takes a minute; the others run as they are traced."""


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_no_garbage() -> Iterator[None]:
    """Each verification collects garbage, which takes as long as itself if it looks through all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def covering() -> ModuleType:
    spec = importlib.util.spec_from_file_location("covering", SCRIPT)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["covering"] = module
    spec.loader.exec_module(module)
    return module


def runs_on_a_cpu(group: str, name: str, option: Any) -> bool:
    return not option.unmet(HOST)


def runs_without_compiling(group: str, name: str, option: Any) -> bool:
    return runs_on_a_cpu(group, name, option) and (group != "compile_mode" or name == "none")


def every_option(group: str, name: str, option: Any) -> bool:
    return True


@cache
def made(keep: Any) -> tuple[Any, list[dict[str, str]], dict[Any, dict[str, str]]]:
    """The space, its rows, and a row for each pair that cannot stand."""
    space = covering().space(MODELS, keep)
    return space, *covering().covering(space)


def words(row: dict[str, str]) -> str:
    return " ".join(covering().words_of(row))


def quick_rows() -> list[str]:
    return [words(row) for row in made(runs_without_compiling)[1]]


def compiled_rows() -> list[str]:
    return [words(row) for row in made(runs_on_a_cpu)[1] if row["compile_mode"] != "compile_mode=none"]


# ---- the set


@pytest.mark.parametrize("keep", [every_option, runs_on_a_cpu, runs_without_compiling])
def test_every_pair_stands_in_a_row_or_is_excluded(keep):
    space, rows, excluded = made(keep)
    held = {pair for row in rows for pair in covering().pairs_of(row)}
    # Counted by itself: each two choices of different factors.
    sizes = [len(choices) for choices in space.factors.values()]
    assert len(space.pairs()) == (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2
    assert held.isdisjoint(excluded)
    assert held | set(excluded) == set(space.pairs())
    assert all(space.fits(row) for row in rows)
    assert len(rows) < len(space.pairs()) / 10, "a row a pair would be no covering set"


def test_every_choice_there_is_takes_part():
    factors = made(every_option)[0].factors
    for group in GROUPS:
        assert set(factors[group]) == {f"{group}={name}" for name in compose.files()[group]}
        for stage in STAGES if group in compose.STAGED else ():
            assert len(factors[f"{group}.{stage}"]) == len(factors[group]) + 1
    assert [factor for factor in factors if factor.startswith("fusion.rewrites.")] == [
        f"fusion.rewrites.{switch.name}" for switch in fields(Rewrites)
    ]
    assert {f"workload={name}" for name in compose.files()["workload"]} < set(factors["workload"])


def test_same_choices_give_the_same_points():
    space, rows, excluded = made(runs_without_compiling)
    assert covering().covering(space) == (rows, excluded)


def test_more_points_cover_again():
    space, rows, _ = made(runs_without_compiling)
    more, _ = covering().covering(space, least=len(rows) + 5)
    assert more[: len(rows)] == rows
    assert len(more) == len(rows) + 5
    assert all(space.fits(row) for row in more)


def test_excluded_pair_is_found_and_nothing_else():
    """Two choices of a toy that cannot stand together; all other pairs do."""
    factors = {name: (f"{name}0", f"{name}1", f"{name}2") for name in "abcd"}
    space = covering().Space(factors, lambda row: ["b: a toy's"] if (row["b"], row["d"]) == ("b1", "d2") else [])
    rows, excluded = covering().covering(space)
    assert list(excluded) == [(("b", "b1"), ("d", "d2"))]
    assert excluded[("b", "b1"), ("d", "d2")] == {"a": "a0", "b": "b1", "c": "c0", "d": "d2"}
    count = Counter(pair for row in rows for pair in covering().pairs_of(row))
    assert set(count) == set(space.pairs()) - set(excluded)
    assert 9 <= len(rows) <= 15, "nine are needed for three choices of each two factors"


# ---- what can run here


@pytest.mark.parametrize("point", quick_rows())
def test_point_computes_the_same_actions(point: str):
    check(point)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "point"), list(enumerate(compiled_rows())))
def test_compiled_point_computes_the_same_actions(number: int, point: str, monkeypatch: pytest.MonkeyPatch):
    if number % GENERATED:
        monkeypatch.setattr(torch, "compile", traced)
    with torch._dynamo.config.patch():
        check(point)
    torch._dynamo.reset()  # what is compiled counts against a limit of the process


def check(point: str) -> None:
    subject = subject_of(*point.split(), *FEW)
    assert subject.unmet(HOST) == []
    assert built(subject).verdict.wrong == []


# ---- what cannot


@cache
def lacking(group: str, name: str) -> tuple[str, ...]:
    """Why a CPU cannot run an option, asked of the option alone."""
    with compose.session():
        return tuple(config.option(group, compose.option_node(group, name)).unmet(HOST))


def taking_effect(row: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(its name in a reason, group, option) of all that a row chooses and some stage uses."""
    for group in GROUPS:
        stages = {stage: row.get(f"{group}.{stage}", "").partition("=")[2] for stage in STAGES}
        if not all(stages.values()):
            yield group, group, row[group].partition("=")[2]
        for stage, name in stages.items():
            if name:
                yield f"{group}.{stage}", group, name


def unmet(row: dict[str, str]) -> list[str]:
    """Why the program would not run it, as it does from the words of the command line."""
    reasons: list[str] = subject_of(*covering().words_of(row), *FEW).unmet(HOST)
    return reasons


def share(part: int) -> list[dict[str, str]]:
    """One of PARTS parts of the rows with every option. No parameters: finding them would take each collection 10 s."""
    return made(every_option)[1][part::PARTS]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_point_is_refused_for_what_its_options_lack_and_nothing_else(part: int):
    assert len(share(part)) > 10
    for row in share(part):
        needs = [f"{where}: {reason}" for where, group, name in taking_effect(row) for reason in lacking(group, name)]
        assert sorted(unmet(row)) == sorted(needs), words(row)
        assert all(reason.split(": ", 1)[1].strip() for reason in needs)


def test_excluded_pair_says_who_excludes_whom():
    """The reason begins with the group of one of the two, alone among plain choices."""
    space, _, excluded = made(every_option)
    for pair, row in excluded.items():
        groups = {factor.split(".")[0] for factor, _ in pair}
        for clash in (clashes := space.clashes(row)):
            where, _, why = clash.partition(": ")
            assert where.split(".")[0] in groups, (pair, clash)
            assert why.strip(), (pair, clash)
        assert clashes, pair


def test_program_says_what_the_options_say():
    """Some of the excluded pairs, composed as a run composes them."""
    space, _, excluded = made(every_option)
    some = list(excluded.values())[::40]
    assert len(some) > 3
    for row in some:
        needs = [f"{where}: {reason}" for where, group, name in taking_effect(row) for reason in lacking(group, name)]
        assert sorted(unmet(row)) == sorted([*needs, *space.clashes(row)])


# ---- the command


def test_command_prints_words_that_compose(capsys):
    words = ["--models", "tiny", "--ready", "--least", "30", "measure=quick"]
    assert covering().main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 30
    assert all(line.startswith("model=tiny ") and line.endswith(" measure=quick") for line in lines)
    assert plain_config(*lines[-1].split())["names"]["measure"] == "quick"
    assert len(set(lines)) > 25
