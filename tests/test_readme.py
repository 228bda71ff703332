"""The README keeps its word: its example runs, its figures are those of the committed results, its files are there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs():
    [code] = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["actions"].shape) == (1, 10, 32)
    assert names["actions"].isfinite().all()


@pytest.mark.parametrize("file", ["README.md", "experiments/README.md"])
def test_figures_are_those_of_the_committed_results(file):
    spec = importlib.util.spec_from_file_location("table", ROOT / "experiments" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    text = (ROOT / file).read_text()
    assert table.written(text, "first_light") == text
    assert re.search(r"<!-- table first_light -->\n.+\|", text, re.DOTALL), "the table is empty"


def test_files_of_the_map_exist():
    block = README.split("## Files\n")[1].split("`kernels/`, `conf/`")[0]
    for line in filter(str.strip, block.splitlines()):
        indent, rest = re.match(r" {4}( *)(.*)", line).groups()
        base = ROOT / "pi0exp" if indent else ROOT
        for name in re.split(r"\s{2,}", rest)[0].split():
            assert (base / name).exists(), f"{name} of the map is not there"


def test_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
