"""This machine, and which options and named stacks it can run:  python -m pi0exp.machine [--json]

Asks each option with its default settings. Opens no GPU context and computes nothing.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.table import Table

from pi0exp import build, compose, config, plugins
from pi0exp.card import console
from pi0exp.errors import UserError
from pi0exp.machine import Machine, this_machine
from pi0exp.result import CONFIG_ERROR


@dataclass(frozen=True)
class Row:
    """What one option or named stack needs.

    group: a group of options, or "stack". numerics: the name of its `Numerics`; "" where the option cannot be loaded.
    reasons: why it cannot run here; none if it is ready. plugin: the distribution that brings it, "" for ours.
    """

    group: str
    name: str
    numerics: str
    reasons: list[str]
    plugin: str


def survey(machine: Machine) -> list[Row]:
    """A row for every option of every group, in the order of application, and then one for every named stack."""
    with compose.session():  # one for all: what it composed of the options serves the stacks
        return [*_options(machine), *_stacks(machine)]


def _options(machine: Machine) -> Iterator[Row]:
    for group in config.GROUPS:
        for name in compose.files()[group]:
            try:
                option = config.option(group, compose.option_node(group, name))
                numerics, reasons = option.numerics.name, option.unmet(machine)
            except UserError as error:  # its class cannot be imported here
                numerics, reasons = "", [str(error)]
            yield Row(group, name, numerics, reasons, _plugin(group, name))


def _stacks(machine: Machine) -> Iterator[Row]:
    for name in compose.files()["stack"]:
        try:
            stack = config.stack(compose.from_words([f"stack={name}"]))
            numerics, reasons = build.numerics(stack).name, build.unmet(stack, machine)
        except UserError as error:
            numerics, reasons = "", [str(error)]
        yield Row("stack", name, numerics, reasons, _plugin("stack", name))


def _plugin(group: str, name: str) -> str:
    file = compose.files()[group][name]
    return next((str(plugin) for plugin in plugins.installed() if file.is_relative_to(plugin.folder)), "")


def facts(machine: Machine) -> list[tuple[str, str]]:
    """The machine as lines of (name, text)."""
    torch = machine.versions.get("torch", "")
    gpu = f"{machine.gpu} ({machine.vendor}, {machine.arch}), {machine.memory_mb} MiB, driver {machine.driver}"
    return [
        ("GPU", gpu if machine.has_gpu else f"none that torch {torch} can use"),
        ("CPU", f"{machine.cores} cores of {machine.cpu}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
    ]


def table(rows: list[Row]) -> Table:
    """One row an option; the group's name only where it begins, a plugin's name behind its options."""
    made = Table(box=None, pad_edge=False)
    for name in ("group", "option", "numerics"):
        made.add_column(name, no_wrap=True)
    made.add_column("on this machine", overflow="fold")
    above = ""
    for row in rows:
        name = f"{row.name} ({row.plugin})" if row.plugin else row.name
        group, above = "" if row.group == above else row.group, row.group
        made.add_row(group, name, row.numerics or "-", "\n".join(row.reasons) or "ready")
    return made


def as_json(machine: Machine, rows: list[Row]) -> str:
    """{"machine": its facts, "options": one object a row, "ready" among its fields}."""
    options = [asdict(row) | {"ready": not row.reasons} for row in rows]
    return json.dumps({"machine": asdict(machine), "options": options}, indent=2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.machine",
        description="This machine, and for every option and named stack whether it is ready, or why it is not.",
        epilog="example: python -m pi0exp.machine --json\n\n"
        "exit codes: 0, whatever is ready; 2 for a GPU or a plugin that cannot be asked",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    given = parser.parse_args(arguments)
    try:
        machine = this_machine()
        rows = survey(machine)
    except UserError as error:
        print(f"pi0exp: {error}", file=sys.stderr)
        return CONFIG_ERROR
    if given.json:
        print(as_json(machine, rows))
        return 0
    print("\n".join(f"{name:>8}  {text}" for name, text in facts(machine)), end="\n\n")
    console().print(table(rows), markup=False)
    return 0
