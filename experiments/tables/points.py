"""Tables of measured points, from their committed records, and the short name of a stack."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pi0exp import compose, point
from pi0exp.card import card
from pi0exp.config import GROUPS
from pi0exp.load import SUFFIXES, read_record
from pi0exp.option import STAGES
from pi0exp.title import word
from pi0exp.track import Record

RESULTS = compose.PACKAGE / "experiments" / "results"
TIMES = ("model", "workload", "options", "numerics")
TIME_NUMBERS = ("p50 ms", "p90 ms", "host p50 ms", "Hz", "of roofline", "error (plain's)")
CHECKS = ("model", "workload", "options", "numerics")
CHECK_NUMBERS = ("error (plain's)", "worst ratio", "mean ratio", "outcome")
RATIOS = ("error/ratio_max", "error/ratio_mean")
NO_ERROR = 1e-200
"""Older records hold 1e-300 for the error of a plain model that is itself the truth, and ratios to that."""
NONE_YET = "Not measured yet.\n"


def records(study: str) -> dict[Path, list[Record]]:
    """Folder of a machine -> the records of its points. Empty where nothing is committed."""
    files = sorted(file for file in (RESULTS / study).rglob("*") if file.name.endswith(SUFFIXES))
    folders = sorted({file.parent for file in files})
    return {folder: [read_record(file) for file in files if file.parent == folder] for folder in folders}


def times(study: str) -> str:
    """A table with latencies for each machine, slowest point first."""
    parts = []
    for found in records(study).values():
        prints = [record["fingerprint"] for record in found]
        counts = sorted({len(record["samples"].get("latency_ms", [])) for record in found} - {0})
        calls = " or ".join(map(str, counts)) or "no"
        rows = [(_order(record), _time_row(record)) for record in found]
        parts.append(f"{machine_line(prints)}; {calls} calls back to back.\n")
        parts.append(markdown(TIMES, TIME_NUMBERS, [row for _, row in sorted(rows)]))
    return "\n".join(parts) or NONE_YET


def checks(study: str) -> str:
    """The same without latencies, for points that shared a GPU while they were measured."""
    parts = []
    for found in records(study).values():
        prints = [record["fingerprint"] for record in found]
        outcomes = Counter(record["outcome"] for record in found)
        counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        common = set.intersection(*(set(changes(record, "model")) for record in found))
        same = f" All with {', '.join(f'model.{change}' for change in sorted(common))}." if common else ""
        parts.append(f"{machine_line(prints)}; {len(found)} points: {counted}.{same}\n")
        parts.append(markdown(CHECKS, CHECK_NUMBERS, sorted(_check_row(record, common) for record in found)))
    return "\n".join(parts) or NONE_YET


def point_card(name: str) -> str:
    """What the run of STUDY/KEY printed, indented as a block of text. SystemExit where there is no such point."""
    study, _, key = name.partition("/")
    found = [record for machine in records(study).values() for record in machine if record["key"] == key]
    if not found:
        raise SystemExit(f"no result {key} in experiments/results/{study}")
    return "\n" + textwrap.indent(card(found[0], "(its id)", settled=False), "    ") + "\n\n"


def markdown(texts: tuple[str, ...], numbers: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table whose last columns, `numbers`, stand to the right."""
    return grid([*((name, False) for name in texts), *((name, True) for name in numbers)], rows)


def grid(columns: list[tuple[str, bool]], rows: list[list[str]]) -> str:
    """A table of columns with their titles, each of numbers, which stand to the right, or not."""
    lines = [[name for name, _ in columns], ["---:" if right else "---" for _, right in columns], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in lines) + "\n"


# ---- cells


def machine_line(prints: list[dict[str, Any]]) -> str:
    """The machine of some measurements, with all their drivers, versions of torch, days and commits."""
    drivers = _all(one.get("driver") or "-" for one in prints)
    torch = _all(one.get("versions", {}).get("torch") or "-" for one in prints)
    days = _all(one.get("date") or "day unknown" for one in prints)
    commits = _all(one.get("commit", "")[:10] or "unknown" for one in prints)
    return f"{prints[0].get('gpu', '?')}, driver {drivers}, torch {torch}, {days}, commit {commits}"


def _all(values: Iterable[str]) -> str:
    return ", ".join(sorted({*values}))


def _order(record: Record) -> tuple[Any, ...]:
    params = record["params"]
    return params["model"], params["workload"], -record["metrics"].get("latency_ms/p50", 0.0), record["key"]


def _time_row(record: Record) -> list[str]:
    metrics, cells = record["metrics"], [*_asked(record, set()), record["numerics"]]
    if record["outcome"] != "ok":
        return [*cells, record["outcome"], "-", "-", "-", "-", "; ".join([error(metrics), *record["reasons"]])]
    numbers = [f"{metrics[name]:.2f}" for name in ("latency_ms/p50", "latency_ms/p90", "latency_host_ms/p50")]
    share = f"{100 * metrics['roofline/share']:.0f} %" if "roofline/share" in metrics else "-"
    return [*cells, *numbers, f"{metrics['throughput_hz']:.1f}", share, error(metrics)]


def _check_row(record: Record, common: set[str]) -> list[str]:
    metrics, cells = record["metrics"], [*_asked(record, common), record["numerics"]]
    ratios = [f"{metrics[name]:.2f}" if metrics.get(name, 1 / NO_ERROR) < 1 / NO_ERROR else "-" for name in RATIOS]
    outcome = ": ".join(filter(None, [record["outcome"], "; ".join(record["reasons"])]))
    return [*cells, error(metrics), *ratios, outcome]


def error(metrics: dict[str, float]) -> str:
    """Relative L2 error of the actions, and in brackets that of the plain policy in the same precision."""
    if "error/rel_l2" not in metrics:
        return "-"
    plain = [value for name, value in metrics.items() if name.startswith("error/rel_l2_plain_")]
    own = "-" if not plain else "0" if plain[0] <= NO_ERROR else f"{plain[0]:.1e}"
    return f"{metrics['error/rel_l2']:.1e} ({own})"


def _asked(record: Record, common: set[str]) -> list[str]:
    """Model and workload, each with what differs from its yaml file and is not `common`; and the options."""
    params = record["params"]
    named = {group: [change for change in changes(record, group) if change not in common] for group in _INPUTS}
    return [*(" ".join([params[group], *changes]) for group, changes in named.items()), short(params)]


_INPUTS = ("model", "workload")


def changes(record: Record, group: str) -> list[str]:
    """`vision.depth=2` for each setting of a model or workload that is not as conf/ has it today."""
    return [f"{name}={value}" for name, value in changed(record, group).items()]


def changed(record: Record, group: str) -> dict[str, Any]:
    """The same as name -> value. What an older record lacks is as it was before it could be set."""
    plain = dict(leaves(_node(group, record["params"][group])))
    given = leaves(record["experiment"][group])
    return {name: value for name, value in given if name in plain and plain[name] != value}


@cache
def _node(group: str, name: str) -> dict[str, Any]:
    with compose.session():
        return compose.option_node(group, name)


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each setting."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---- the options


def short(params: dict[str, str]) -> str:
    """The stack in few words: its name if it has one, then what differs from it, else from plain PyTorch.

    A rewrite is `+name` or `-name`. A name that conf/ no longer has says nothing: all options follow it.
    """
    stack, given = params.get("stack"), _effective(params)
    expected = _named(stack) if stack in compose.files()["stack"] else compose.defaults()
    words = [word(name, value) for name, value in given.items() if expected.get(name) != value]
    for name in (name for name in expected if name not in given and "." in name):
        if (value := _by_default(name, given)) is not None and value != expected[name]:
            words.append(word(name, value))
    return f"`{' '.join(filter(None, [stack, *words]))}`" if stack or words else "none: plain PyTorch"


@cache
def _named(stack: str) -> dict[str, str]:
    """What a named stack is by itself."""
    return _effective(point.stack_params(compose.from_words([f"stack={stack}"])))


def _effective(params: dict[str, str]) -> dict[str, str]:
    """Options and changed settings, less the options of single stages that only repeat their group's."""
    given = {name: value for name, value in params.items() if name.partition(".")[0] in GROUPS}
    return {name: value for name, value in given.items() if not _repeats(name, given)}


def _repeats(name: str, given: dict[str, str]) -> bool:
    group, _, stage = name.partition(".")
    if stage not in STAGES or given[name] != given[group]:
        return False
    options = (group, *(f"{group}.{one}" for one in STAGES))
    return all(other in options for other in given if other.startswith(f"{group}."))  # no settings of either


def _by_default(name: str, given: dict[str, str]) -> str | None:
    """What an option of a stage or a setting is if nothing says so; None where the options have no such setting."""
    group, _, inner = name.partition(".")
    if inner in STAGES:
        return given[group]
    stage, _, setting = inner.partition(".")
    option = given.get(f"{group}.{stage}", given[group]) if stage in STAGES else given[group]
    value = dict(leaves(_node(group, option))).get(setting if stage in STAGES else inner)
    return value if value is None or isinstance(value, str) else json.dumps(value)
