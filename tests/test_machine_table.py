"""`python -m pi0exp.machine`: what the machine is, and what of all that is there it can run."""

import json
import sys

import pytest
from cli import module
from helpers import GROUPS_OF, plain_config

from pi0exp import build, compose, config, machine_table
from pi0exp.config import GROUPS
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.machine_table import Row, as_json, survey, table

HOST = Machine()
H200 = Machine(gpu="NVIDIA H200", vendor="nvidia", arch="sm_90", memory_mb=143771, driver="580.1")


def test_every_option_and_stack_has_a_row():
    rows = survey(HOST)
    assert [(row.group, row.name) for row in rows] == [
        (group, name) for group in (*GROUPS, "stack") for name in GROUPS_OF[group]
    ]
    assert all(row.plugin == "" for row in rows)


@pytest.mark.parametrize("machine", [HOST, H200], ids=["cpu", "h200"])
def test_reasons_are_those_that_a_run_would_give(machine: Machine):
    for row in survey(machine):
        stack = config.stack(plain_config(f"{row.group}={row.name}"))
        if row.group == "stack":
            assert row.reasons == build.unmet(stack, machine)
        else:
            assert row.reasons == getattr(stack, row.group).unmet(machine)
            assert row.numerics == getattr(stack, row.group).numerics.name


def test_graphs_need_a_gpu():
    def ready(machine: Machine) -> dict[tuple[str, str], bool]:
        return {(row.group, row.name): not row.reasons for row in survey(machine)}

    here, there = ready(HOST), ready(H200)
    for name in (("graphs", "manual"), ("stack", "2_sdpa")):
        assert not here[name]
        assert there[name]
    assert here["attention", "sdpa"]
    assert here["stack", "0_eager"]


def test_option_that_cannot_be_loaded_says_so(monkeypatch):
    """The others are told of all the same."""
    monkeypatch.setitem(sys.modules, "pi0exp.graphs.manual", None)
    rows = {(row.group, row.name): row for row in survey(HOST)}
    row = rows["graphs", "manual"]
    assert row.reasons[0].startswith("graphs: _target_ 'pi0exp.graphs.manual.Manual' cannot be loaded")
    assert row.numerics == ""
    assert rows["stack", "1_graphs"].reasons == row.reasons
    assert rows["attention", "eager"].reasons == []


def test_named_stack_tells_what_excludes_what(monkeypatch, tmp_path):
    """A stack of two options of which one says that it cannot stand beside the other."""
    from pi0exp.graphs.none import NoGraph

    monkeypatch.setattr(NoGraph, "clashes", lambda self, stack: ["a toy's reason"])
    [row] = [row for row in survey(HOST) if (row.group, row.name) == ("stack", "0_eager")]
    assert row.reasons == ["graphs: a toy's reason"]


def test_broken_plugin_is_one_line(monkeypatch, capsys):
    def broken() -> None:
        raise UserError("somebody: the entry point cannot be loaded")

    monkeypatch.setattr(compose, "files", broken)
    assert machine_table.main([]) == 2
    assert capsys.readouterr().err == "pi0exp: somebody: the entry point cannot be loaded\n"


def test_table_and_json_say_the_same(capsys):
    rows = [
        Row("graphs", "manual", "EXACT", ["needs a GPU", "needs luck"], ""),
        Row("graphs", "theirs", "REORDERED", [], "pi0exp-example 0.1.0"),
    ]
    from rich.console import Console

    Console(width=100).print(table(rows), markup=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["graphs", "manual", "EXACT", "needs", "a", "GPU"],
        ["needs", "luck"],
        ["theirs", "(pi0exp-example", "0.1.0)", "REORDERED", "ready"],
    ]
    told = json.loads(as_json(H200, rows))
    assert told["machine"]["arch"] == "sm_90"
    assert [(row["name"], row["ready"], row["reasons"]) for row in told["options"]] == [
        ("manual", False, ["needs a GPU", "needs luck"]),
        ("theirs", True, []),
    ]


def check_table(text: str) -> None:
    for part in ("GPU  ", "torch ", "attention ", "2_sdpa"):
        assert part in text


def test_words(capsys):
    assert machine_table.main([]) == 0
    check_table(capsys.readouterr().out)
    assert machine_table.main(["--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"machine", "options"}


@pytest.mark.slow
def test_command(tmp_path):
    shown = module("pi0exp.machine", scratch=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    check_table(shown.stdout)
    told = module("pi0exp.machine", "--json", scratch=tmp_path)
    assert told.returncode == 0
    assert set(json.loads(told.stdout)) == {"machine", "options"}


def test_command_opens_no_gpu_context():
    """Where there is a GPU, a context of its own would take hundreds of megabytes from whoever measures."""
    import torch

    survey(HOST)
    assert not torch.cuda.is_initialized()
