"""In what two records differ: settings, machine, versions, code; and whether they did the same work."""

from collections.abc import Iterator
from typing import Any

from pi0exp.config import GROUPS
from pi0exp.track import Record

WORK = ("subject", "model", "workload")
"""Sections of an experiment that say what is computed. The other ones say how, or how it is measured."""
_PRINTS = ("gpu", "arch", "driver", "cuda", "hip", "cpu", "cores", "commit", "dirty", "date")


def differences(a: Record, b: Record) -> list[tuple[str, str, str]]:
    """(setting, A, B), options first; then the machine, versions and code."""
    same = [group for group in GROUPS if _words(a, group) == _words(b, group)]
    sides = [_settings(record, same) for record in (a, b)]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [
        (name, sides[0].get(name, "-"), sides[1].get(name, "-"))
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]


def other_work(a: Record, b: Record) -> list[str]:
    """The sections in which it is not the same that both computed; weights and recordings by their content."""
    return [name for name in WORK if _work(a["experiment"], name) != _work(b["experiment"], name)]


def _work(experiment: dict[str, Any], section: str) -> tuple[Any, dict[str, str]]:
    files = experiment.get("files", {})
    return experiment.get(section), {name: files[name] for name in files if name.startswith(f"{section}.")}


def _words(record: Record, group: str) -> dict[str, str]:
    return {name: value for name, value in record["params"].items() if name.split(".")[0] == group}


def _settings(record: Record, same: list[str]) -> dict[str, str]:
    """Names as on the command line -> values. An option's own settings only as far as they are not its file's.

    same: groups that both sides name alike. There the settings that the words were composed to follow: a file of
    conf/ may have changed between two versions of the code.
    """
    found = {name: str(value) for name, value in record["params"].items()}
    sections = {name: part for name, part in record["experiment"].items() if name not in (*GROUPS, "names")}
    for name, value in leaves(sections):
        found.setdefault(name, str(value))
    composed = leaves({group: record["experiment"].get(group) for group in same})
    found |= {f"{name} (composed)": str(value) for name, value in composed if name not in found}
    prints = record["fingerprint"]
    found |= {f"machine.{name}": str(prints[name]) for name in _PRINTS if name in prints}
    return found | {f"versions.{name}": str(version) for name, version in prints.get("versions", {}).items()}


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each setting that has one."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
