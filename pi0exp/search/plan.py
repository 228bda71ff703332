"""What a search will do, settled before its first point: its space, its named stacks, where the result goes."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pi0exp import build, compose, config, subject
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.measure import target_machine
from pi0exp.option import Numerics
from pi0exp.point import run_params
from pi0exp.policy_subject import PolicySubject
from pi0exp.search import proposals, stack_file
from pi0exp.search.loop import Named
from pi0exp.search.narrow import Narrowed
from pi0exp.search.settings import Objective, SearchConfig
from pi0exp.search.space import Space, space
from pi0exp.sweep import key_of

_OF_THIS_MACHINE = ("track", "resume", "search.write")
"""Settings that say nothing of what was searched, but name this machine's folders."""


@dataclass(frozen=True)
class Plan:
    """base: words that hold for every point. seed: of the observations of the search.

    named: stacks that are measured first. absent: named stack -> why it takes no part. standing: the stack that the
    result would replace. path: where the result goes; None: nowhere, because of `unwritten`. asked: what is searched,
    in the words of its file. explain: tell all this, and measure nothing.
    """

    settings: SearchConfig
    base: list[str]
    seed: int
    space: Space
    named: list[Named]
    absent: dict[str, str]
    standing: Named | None
    path: Path | None
    unwritten: str
    asked: str
    explain: bool


def plan(words: Narrowed, settings: SearchConfig) -> Plan:
    """Raises UserError for all that can be known to be wrong before the first point."""
    plain = compose.from_words(words.base)
    thing, measure = subject.subject(plain), config.measure(plain)
    if not isinstance(thing, PolicySubject):
        raise UserError(f"subject={plain['names'].get('subject')}: study=search is of stacks of the whole policy")
    if not measure.explain:
        proposals.optuna()
    machine, lacking = target_machine(measure.device)
    if lacking := lacking + _unmeasurable(settings, machine, measure):
        raise UserError("; ".join(lacking))
    thing.preflight()

    made = space(plain, words, machine)
    named, absent = _named(made, words.base, settings.stacks, machine)
    if settings.n_trials < len(named):
        raise UserError(
            f"search.n_trials is {settings.n_trials}, fewer than the {len(named)} named stacks that are measured first:"
            f" {', '.join(one.name for one in named)}; search.stacks names others"
        )
    path, unwritten = stack_file.target(settings.write, machine, plain)
    params = run_params(plain, thing)
    dimensions = {key: value for key, _, value in (word.partition("=") for word in words.base) if key[:6] == "model."}
    asked = stack_file.asked_of(params | dimensions, settings.objectives)
    standing = None
    if path is not None and not measure.explain:
        stack_file.check(path, asked)
        standing = _standing(path, made, words.base, machine)
    seed = int(plain["workload"]["seed"])
    return Plan(
        settings, words.base, seed, made, named, absent, standing, path, unwritten, asked, explain=measure.explain
    )


def _unmeasurable(settings: SearchConfig, machine: Machine, measure: config.MeasureConfig) -> list[str]:
    if Objective.energy not in settings.objectives:
        return []
    what = "search.objectives=latency,energy"
    if not machine.has_gpu:
        return [f"{what} needs a GPU, whose energy can be measured; this is a CPU"]
    if measure.power_s == 0:
        return [f"{what} needs the pass that measures energy, and measure.power_s is 0: set measure.power_s=5 or more"]
    return []


def _named(
    made: Space, base: Sequence[str], names: Sequence[str], machine: Machine
) -> tuple[list[Named], dict[str, str]]:
    """The named stacks that take part, and why the others do not."""
    named: list[Named] = []
    absent: dict[str, str] = {}
    for name in names:
        if name not in compose.files()["stack"]:
            raise UserError(f"search.stacks: {name}: no such stack; there are {', '.join(compose.files()['stack'])}")
        one = _of_stack(name, made, base, machine)
        if isinstance(one, str):
            absent[name] = one
        elif twin := next((other for other in named if other.words == one.words), None):
            absent[name] = f"it has the options of stack={twin.name}"
        else:
            named.append(one)
    return named, absent


def _of_stack(name: str, made: Space, base: Sequence[str], machine: Machine) -> Named | str:
    """A named stack, by its row where it is one; or why it takes no part."""
    plain = compose.from_words([*base, f"stack={name}"])
    row, stack = made.row_of(plain), config.stack(plain)
    if isinstance(row, str):
        return row
    if made.stack(row) == stack:
        reasons = made.excluded(row)
        return "; ".join(reasons) or Named(name, tuple(made.words(row)), row)
    # It has settings that are no factor. It competes all the same, but the sampler learns nothing of it.
    reasons = build.unmet(stack, machine) + made.slow(row)
    if build.numerics(stack) is Numerics.APPROXIMATE:
        reasons.append("it is APPROXIMATE")
    return "; ".join(reasons) or Named(name, (f"stack={name}",), None)


def _standing(path: Path, made: Space, base: Sequence[str], machine: Machine) -> Named | None:
    """The result of an earlier search at this place, which must not be replaced by a slower one."""
    if path.parent != compose.CONF / "stack" or not path.exists():
        return None
    one = _of_stack(path.stem, made, base, machine)
    if isinstance(one, str) or one.row is None:
        why = one if isinstance(one, str) else "it has settings that are no factor of the search"
        raise UserError(f"{path} cannot take part in the closing comparison: {why}; remove it, or set search.write")
    return one


def command(arguments: Sequence[str]) -> str:
    """The command line, without what only says where things lie on this machine."""
    kept = [word for word in arguments if not key_of(word).startswith(_OF_THIS_MACHINE)]
    return f"python -m pi0exp {shlex.join(kept)}"
