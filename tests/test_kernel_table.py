"""Names of kernels: recorded ones of this policy, and others of the same libraries."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from pi0exp.kernel_table import CATEGORIES, TABLE, category, category_of
from pi0exp.slices import Kind, Slice

DATA = Path(__file__).parent / "data"
KERNELS = Path(__file__).parent.parent / "kernels"


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


RECORDED = rows("kernel_names.tsv")
"""The kernels that take most time in traces of this policy on H200, MI350 and MI300X, with their times."""
UNSEEN = rows("kernel_names_unseen.tsv")
"""Other kernels of the same libraries, and where each belongs."""


@pytest.mark.parametrize("source", sorted({row["source_file"] for row in RECORDED}))
def test_little_time_of_recorded_traces_is_other(source):
    spent: dict[str, float] = defaultdict(float)
    for row in RECORDED:
        if row["source_file"] == source:
            spent[category_of(row["kernel_name"])] += float(row["total_us"])
    assert spent["other"] < 0.03 * sum(spent.values())
    # A product is the largest part in each of them, and attention, norms and activations are there.
    assert spent["gemm"] > 0.5 * sum(spent.values())
    assert min(spent["attention"], spent["norm"], spent["activation"], spent["rope"]) > 0


@pytest.mark.parametrize("row", UNSEEN, ids=lambda row: row["kernel_name"][:60])
def test_other_kernels_of_the_same_libraries(row):
    assert category_of(row["kernel_name"]) == row["category"]


@pytest.mark.parametrize("row", UNSEEN, ids=lambda row: row["kernel_name"][:60])
def test_what_rocprof_appends_changes_nothing(row):
    assert category_of(row["kernel_name"] + ".kd") == row["category"]
    assert category_of(row["kernel_name"] + " [clone .kd]") == row["category"]
    assert category_of(row["kernel_name"] + " (.kd)") == row["category"]


def test_every_kernel_of_ours_is_listed():
    """A new kernel must be put into the list above, and so into a category."""
    source = "\n".join(file.read_text() for file in sorted(KERNELS.glob("*.py")))
    defined = {line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def ")}
    ours = {name for name in defined if name.endswith("_kernel")}
    assert ours == {row["kernel_name"] for row in UNSEEN if row["library"] == "pi0exp"}


def test_a_name_of_no_library_is_other():
    assert category_of("zebra_crossing") == "other"


def test_copies_and_fills_of_the_profiler_need_no_name():
    assert category(Slice("gemm", 1.0, kind=Kind.copy)) == "copy"
    assert category(Slice("gemm", 1.0, kind=Kind.fill)) == "copy"
    assert category(Slice("gemm", 1.0)) == "gemm"


def test_every_category_can_be_reached():
    assert {category_of(row["kernel_name"]) for row in UNSEEN} | {"other"} == set(CATEGORIES)
    assert {category for category, _ in TABLE} | {"other"} == set(CATEGORIES)
