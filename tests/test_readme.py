"""The README keeps its word: its example runs, its commands compose, its tables are those of the committed results and
of conf/, its files are there."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest

from pi0exp import compose
from pi0exp.config import GROUPS
from pi0exp.experiments import table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
WITH_TABLES = ("README.md", "experiments/README.md")
WITH_COMMANDS = (*WITH_TABLES, "kernels/README.md", "conf/hydra/help/pi0exp.yaml")


def test_example_runs():
    [code] = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["actions"].shape) == (1, 10, 32)
    assert names["actions"].isfinite().all()


@pytest.mark.parametrize("file", WITH_TABLES)
def test_tables_are_those_of_the_committed_results_and_of_conf(file):
    text = (ROOT / file).read_text()
    assert table.written(text) == text, "run: python experiments/table.py --write README.md experiments/README.md"


@pytest.mark.parametrize("file", WITH_TABLES)
def test_every_mark_of_a_table_is_one(file):
    text = (ROOT / file).read_text()
    marks = re.findall(r"<!-- \w+ \S+ -->", text)
    blocks = [match["start"].strip() for match in table.BLOCK.finditer(text)]
    assert marks == blocks
    assert text.count("<!-- end -->") == len(blocks)
    assert re.search(r"<!-- table stacks -->\n.+\| pi0 ", text, re.DOTALL), "the table is empty"


def test_every_choice_is_named():
    for group, files in compose.files().items():
        for name in files:
            text = name if group == "stack" else f"{group}={name}"
            assert f"`{text}`" in README, f"{group}={name}"


@pytest.mark.parametrize("file", WITH_COMMANDS)
def test_commands_compose(file):
    text = (ROOT / file).read_text()
    for given in re.findall(r"python -m pi0exp (?![^\n`]*\$)((?:-m )?[a-z][^\n`]*)", text):
        words = shlex.split(re.split(r" {2,}| && ", given)[0])
        swept = words[0] == "-m"
        several = swept or "study=search" in words  # which several values narrow
        choices = [word.partition("=") for word in words[swept:]]
        for values in product(*(value.split(",") if several else [value] for _, _, value in choices)):
            compose.from_words([f"{key}={value}" for (key, _, _), value in zip(choices, values, strict=True)])


def test_commands_are_found():
    counts = {
        file: len(re.findall(r"python -m pi0exp (?:-m )?[a-z]", (ROOT / file).read_text())) for file in WITH_COMMANDS
    }
    assert counts["README.md"] > 9
    assert counts["conf/hydra/help/pi0exp.yaml"] > 9


def test_modules_named_exist():
    for file in WITH_COMMANDS:
        for name in re.findall(r"python -m (pi0exp[\w.]*)", (ROOT / file).read_text()):
            path = ROOT.joinpath(*name.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_files_of_the_map_exist():
    block = README.split("## Files\n")[1].split("`kernels/`, `conf/`")[0]
    for line in filter(str.strip, block.splitlines()):
        indent, rest = re.match(r" {4}( *)(.*)", line).groups()
        base = ROOT / "pi0exp" if indent else ROOT
        for name in re.split(r"\s{2,}", rest)[0].split():
            assert (base / name).exists() or (ROOT / "experiments" / name).exists(), f"{name} of the map is not there"


def test_the_map_has_every_module_and_every_group():
    block = README.split("## Files\n")[1].split("`kernels/`, `conf/`")[0]
    for file in (ROOT / "pi0exp").glob("*.py"):
        assert re.search(rf"(?<![\w.]){re.escape(file.name)}(?![\w.])", block) or file.stem == "__init__", file.name
    assert all(f" {group}/" in block for group in GROUPS)


def test_links_lead_somewhere():
    for file in ("README.md", "experiments/README.md", "kernels/README.md"):
        for link, anchor in re.findall(r"\]\(([^)#:]*)(#[\w-]+)?\)", (ROOT / file).read_text()):
            target = (ROOT / file).parent / link if link else ROOT / file
            assert target.exists(), f"{file}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert anchor[1:] in {head.lower().replace(" ", "-") for head in heads}, f"{file}: {link}{anchor}"


def test_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
