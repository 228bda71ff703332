"""Each command beside the main one explains itself, refuses what is missing or foreign, and stands in the README.

Foreign files of ceilings: tests/test_ceilings.py, since that command ends earlier where there is no GPU.
"""

import re
from importlib import import_module
from pathlib import Path

import pytest
from made_records import keep

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = ("breakdown", "ceilings", "compare", "export", "gate", "machine", "parity")
ELSEWHERE = {"machine": "machine_table"}
"""Command -> the module that holds its `main`."""


def main(name: str, *words: object) -> int:
    """The exit code of `python -m pi0exp.NAME WORDS`."""
    try:
        return int(import_module(f"pi0exp.{ELSEWHERE.get(name, name)}").main([*map(str, words)]))
    except SystemExit as ended:  # argparse
        return int(ended.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(name, capsys):
    assert main(name, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: python -m pi0exp.{name}" in text
    examples = re.findall(rf"examples?:\s+python -m pi0exp\.{name}", " ".join(text.split()))
    assert len(examples) == 1
    [codes] = re.findall(r"exit codes: (.*)", " ".join(text.split()))
    assert re.match(r"0\b.*\b2\b", codes)


@pytest.mark.parametrize("name", COMMANDS)
def test_words_that_it_does_not_know_are_refused(name, capsys):
    assert main(name, "--nonsense") == 2
    assert f"usage: python -m pi0exp.{name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_names_it_in_its_table(name):
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    assert any(f"`python -m pi0exp.{name}" in row for row in rows)


def given(name: str, file: Path, tmp_path: Path) -> list[object]:
    """A command line in which `file` is what the command reads."""
    good = keep(tmp_path / "good")
    return {
        "breakdown": [file],
        "compare": [good, file],
        "gate": ["--baseline", file],
        "parity": ["--reference", good, "--candidate", file],
        "export": ["toy", "--format", "csv", "--uri", f"sqlite:///{file}"],
    }[name]


READERS = ("breakdown", "compare", "export", "gate", "parity")


CONTENTS = (None, "", "neither one nor the other\n" * 200, '{"some": "json"}', "[[1, 2]]")
# An empty file is an empty store.
FOREIGN = [(name, content) for name in READERS for content in CONTENTS if (name, content) != ("export", "")]


@pytest.mark.parametrize(("name", "content"), FOREIGN)
def test_missing_and_foreign_files_are_one_line_and_exit_code_2(name, content, tmp_path, capsys):
    file = tmp_path / ("file.db" if name == "export" else "file.json")
    if content is not None:
        file.write_text(content)
    assert main(name, *given(name, file, tmp_path)) == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert out == ""
    assert line.startswith("pi0exp: ")
    assert file.name in line
