"""What a search says: its space beforehand, a table of its points, how it ended, and the evidence in its file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pi0exp import intervals
from pi0exp.search.closing import Contestant
from pi0exp.search.loop import Found, Named
from pi0exp.search.settings import Objective, SearchConfig
from pi0exp.search.space import Space
from pi0exp.search.trial import ERROR, P50, Trial, counted
from pi0exp.title import word

MOST = 5
"""Reasons of excluded proposals that are shown, the most frequent ones."""


def space_text(space: Space, named: Sequence[Named], absent: dict[str, str]) -> str:
    """The factors with their choices, what is left out and why, and the named stacks to begin with.

    absent: named stack -> why it takes no part.
    """
    lines = [f"space: {space.size:.1e} rows, those that exclude each other among them"]
    lines += [f"  {name}: {', '.join(choices)}" for name, choices in space.factors.items()]
    lines += ["left out:"] if space.left_out else []
    lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in space.left_out.items()]
    lines.append(f"measured first: {', '.join(f'stack={one.name}' for one in named) or 'no named stack'}")
    lines += [f"  not stack={name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def short(words: Sequence[str], plain: dict[str, str]) -> str:
    """The words that differ from the plain options. plain: group -> its default."""
    pairs = [one.partition("=") for one in words]
    return " ".join(word(key, value) for key, _, value in pairs if plain.get(key) != value) or "plain PyTorch"


def table(rows: list[dict[str, Any]]) -> Table:
    """The closing table of a search: one row a point, in the order in which they were measured."""
    power = any(Objective.energy.metric in point["metrics"] for point in rows)
    made = Table(box=None, pad_edge=False)
    for name in ("#", "p50 ms", *(["J/call"] if power else []), "error"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("outcome", "point"):
        made.add_column(name, overflow="fold")
    for i, point in enumerate(rows):
        shown = [P50, *([Objective.energy.metric] if power else [])]
        cells = [_number(point["metrics"], name, ".2f") for name in shown]
        outcome = "; ".join([point["outcome"], *point["reasons"]])
        made.add_row(str(i), *cells, _number(point["metrics"], ERROR, ".1e"), outcome, point.get("trial", "-"))
    return made


def _number(metrics: dict[str, float], name: str, form: str) -> str:
    return f"{metrics[name]:{form}}" if name in metrics else "-"


def values_text(trial: Trial) -> str:
    """p50 with its interval, and the energy if it was measured."""
    metrics = trial.metrics
    text = f"p50 {metrics[P50]:.3f} ms"
    if f"{P50}_low" in metrics:
        text += f" ({metrics[f'{P50}_low']:.3f} to {metrics[f'{P50}_high']:.3f} at 95 %)"
    if Objective.energy.metric in metrics:
        text += f", {metrics[Objective.energy.metric]:.3f} J a call"
    return text


def result(
    found: Found,
    ranked: Sequence[Contestant],
    front: Sequence[Contestant],
    settings: SearchConfig,
    plain: dict[str, str],
) -> str:
    """How the search ended, its closing comparison, and which stack it is. plain: see `short`."""
    lines = [_count(found, settings)]
    if found.ended:
        lines.append(f"ended before search.n_trials={settings.n_trials}: {found.ended}")
    reasons = Counter(found.excluded).most_common(MOST)
    lines += [f"  excluded {count} times: {reason}" for reason, count in reasons]
    lines += ["", "closing comparison, on other observations:"]
    for one in ranked:
        before = one.first.values(settings.objectives)[0] if one.first is not None else None
        searched = "no point of the search" if before is None else f"{before:.2f} in the search"
        numbers = " ".join(f"{value:9.3f}" for value in one.values(settings.objectives))
        mark = "*" if one in front else " "
        lines.append(f"{mark} {numbers}  ({searched})  {one.name or short(one.words, plain)}")
    what = "the fastest" if len(settings.objectives) == 1 else "Pareto front of latency (ms) and energy (J)"
    lines += [f"* {what}; ms{' and J' if len(settings.objectives) > 1 else ''}"]
    lines += [standing(ranked)] if len(ranked) > 1 else []
    return "\n".join(lines)


def _count(found: Found, settings: SearchConfig) -> str:
    trials = len(found.trials)
    text = f"search: {trials} points ({counted(found.trials, settings.objectives)})"
    return text + (f"; {len(found.excluded)} proposals exclude themselves, not measured" if found.excluded else "")


def standing(ranked: Sequence[Contestant]) -> str:
    """The fastest beside the second and beside the best named stack, in the closing comparison."""
    first, second = ranked[0], ranked[1]
    ratio = _p50(second) / _p50(first)
    text = f"The runner-up takes {ratio:.3f} times as long"
    text += ", which is no difference to rely on" if ratio < 1 + intervals.MARGIN else ""
    named = next((one for one in ranked if one.name), None)
    if named is first:
        return f"{text}. No stack that was found is faster than the named one."
    return text + (f"; stack={named.name} {_p50(named) / _p50(first):.3f} times." if named is not None else ".")


def _p50(one: Contestant) -> float:
    return one.values([Objective.latency])[0]


def evidence(
    found: Found,
    ranked: Sequence[Contestant],
    front: Sequence[Contestant],
    settings: SearchConfig,
    command: str,
    plain: dict[str, str],
) -> list[str]:
    """The sentences of the file's head, one or more lines each. The first of `ranked` is the stack in the file."""
    best = ranked[0]
    last = best.again[-1]
    machine, metrics = last.point["fingerprint"], last.metrics
    errors = [
        f"{name.removeprefix('error/rel_l2_plain_')} {value:.2e}"
        for name, value in metrics.items()
        if "_plain_" in name
    ]
    commit = str(machine.get("commit") or "unknown")[:10] + ("-dirty" if machine.get("dirty") == "true" else "")
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    lines = [
        f"{machine['date']}, {machine['gpu']}{driver}, torch {machine['versions'].get('torch', '?')}, commit {commit}",
        f"command: {command}",
        f"search: {_count(found, settings).removeprefix('search: ')}, seed {settings.seed}"
        + (f", ended early: {found.ended}" if found.ended else ""),
        f"closing comparison, which alone chose: {len(ranked)} stacks, {settings.repeats} more"
        f" measurement{'s' * (settings.repeats != 1)} each, in turns, on observations that the search had not seen",
        f"this stack: {_closing(best)}; {_before(best, settings)}",
        f"error of the actions: rel L2 {metrics[ERROR]:.2e} (plain {', '.join(errors)}),"
        f" declared {last.point['numerics']}",
    ]
    if len(ranked) > 1:
        runner = ranked[1]
        lines.append(f"runner-up: {runner.name or short(runner.words, plain)}: {_closing(runner)}")
        named = next((one for one in ranked if one.name), None)
        if named is not None and named not in (best, runner):
            lines.append(f"best named stack: {named.name}: {_closing(named)}")
        lines.append(standing(ranked))
    if len(settings.objectives) > 1:
        lines.append("Pareto front of latency and energy in the closing comparison; this file is its fastest:")
        lines += [f"- {_closing(one)}: {' '.join(one.words)}" for one in front]
    return lines


def _closing(one: Contestant) -> str:
    return "; ".join(f"{values_text(trial)}, key {trial.key}" for trial in one.again)


def _before(one: Contestant, settings: SearchConfig) -> str:
    return (
        f"in the search {values_text(one.first)}, key {one.first.key}"
        if one.first is not None
        else "no point of the search"
    )


def head(best: Contestant, objectives: Sequence[Objective], path: Path) -> str:
    """The sentence that the file opens with, and that tables of named stacks show."""
    point = best.again[-1].point
    whose = f"{point['params'].get('model')}, workload {point['params'].get('workload')}"
    what = "The fastest" if len(objectives) == 1 else "The fastest of the Pareto front of latency and energy"
    same = f"; the options of `{best.name}`" if best.name and best.name != path.stem else ""
    return f"{what} that study=search found on {point['fingerprint']['gpu']} for {whose}{same}."
