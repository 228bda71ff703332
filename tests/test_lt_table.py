"""Tables of cuBLASLt's algorithms, the search that fills them, and its command, without a GPU."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import plain_config
from test_lt_tuned import ALGORITHM, FASTER, GPU, SAME

from pi0exp import config
from pi0exp.errors import UserError
from pi0exp.gemm import lt_tune
from pi0exp.gemm.lt_search import Shape, neighbours
from pi0exp.gemm.lt_table import LtTable, read_table, shipped
from pi0exp.machine import Machine
from pi0exp.model.config import ModelConfig

GOOD: dict[str, Any] = json.loads(LtTable("sm_90", 130100, {"gpu": "X"}, {Shape(1, 2, 3, True): FASTER}).text())


def test_a_table_is_read_as_it_was_written(tmp_path: Path):
    table = LtTable("sm_90", 130100, {"gpu": "X"}, {Shape(9, 2, 3, False): SAME, Shape(1, 2, 3, True): FASTER})
    path = tmp_path / "t.json"
    path.write_text(table.text())
    assert read_table(path) == table
    assert [row["M"] for row in json.loads(table.text())["rows"]] == [1, 9]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no table of cuBLASLt's algorithms: Expecting value"),
        ("[]", "is no table of cuBLASLt's algorithms: list indices"),
        (json.dumps(GOOD | {"rows": [{"M": 1}]}), "is no table of cuBLASLt's algorithms: lacks 'N'"),
        (json.dumps({"rows": []}), "is no table of cuBLASLt's algorithms: lacks 'arch'"),
        (json.dumps(GOOD | {"rows": GOOD["rows"] * 2}), "has two rows for one shape"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_what_is_no_table_is_told_in_one_line(tmp_path: Path, text: str | None, reason: str):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"gemm\.table .*t\.json {reason}") as caught:
        read_table(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"gemm\.table .*t\.json"):
        config.stack(plain_config("gemm=lt_tuned", f"gemm.table={path}"))


def test_the_shipped_table_has_every_shape_of_the_tuner():
    table = read_table(shipped("sm_90"))
    assert set(table.rows) == set(lt_tune.shapes(lt_tune.PROMPTS, ModelConfig()))
    assert all(0 < found.us <= found.first_us for found in table.rows.values())
    assert {"gpu", "driver", "torch", "date", "command"} <= set(table.about)


def test_neighbours_differ_in_one_choice():
    found = set(neighbours(ALGORITHM)) - {ALGORITHM}
    own = dataclasses.asdict(ALGORITHM)
    changed = [{name for name, value in dataclasses.asdict(one).items() if value != own[name]} for one in found]
    assert {frozenset(one) for one in changed} == {
        frozenset({"cluster"}), frozenset({"custom"}), frozenset({"split_k", "reduction"})
    }  # fmt: skip
    assert all((one.split_k > 1) == (one.reduction > 0) for one in found)


def test_shapes_are_those_of_the_policy():
    found = lt_tune.shapes([20], ModelConfig())
    assert Shape(768, 1152, 4304, True) in found
    assert {shape for shape in found if shape.M == 788} == {
        Shape(788, 2560, 2048, False), Shape(788, 512, 2048, False), Shape(788, 2048, 2048, False),
        Shape(788, 32768, 2048, False), Shape(788, 2048, 16384, False),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--prompts", "-1"], 2, "a length is 0 or more"),
        (["--prompts", "many"], 2, "invalid int value"),
        ([], 3, "needs a GPU of NVIDIA's; this machine has CPU"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], code: int, told: str, capsys, monkeypatch):
    monkeypatch.setattr(lt_tune, "this_machine", Machine)
    try:
        found = lt_tune.main(words)
    except SystemExit as error:
        found = int(str(error.code))
    assert found == code
    assert told in capsys.readouterr().err


def test_the_command_refuses_a_folder_that_is_not_there(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(lt_tune, "this_machine", lambda: GPU)
    assert lt_tune.main(["--out", str(tmp_path / "none" / "t.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
