"""Each row of docs/faults.md is what happens: faults of the tiny model, in one sweep and in the one after it."""

from collections import Counter

import faults
import pytest
from cli import QUICK, REPOSITORY, artifact, pi0exp, processes, runs
from fault_options import FAULTS

from pi0exp import isolate

ROWS = [fault for fault in faults.FAULTS if fault.where == faults.TINY]
NAMES = ["none", *(fault.name for fault in ROWS)]
REPEATED = ["none", "exception", "device_oom", "orphan"]


def test_committed_table_is_that_of_the_suite():
    assert (REPOSITORY / "docs" / "faults.md").read_text() == faults.table(), "run: make faults"


def test_table_has_enough_kinds():
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS) >= 15
    assert {fault.name for fault in ROWS} == FAULTS.keys() - {"none", "hang"}, "each that can be injected is"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "marks").mkdir()
    return folder


def sweep(root, names):
    words = ("graphs._target_=fault_options.Faulty", f"+graphs.marks={root}/marks")
    return pi0exp(root, *QUICK, *words, "-m", f"+graphs.fault={','.join(names)}")


@pytest.fixture(scope="module")
def first(root):
    done = sweep(root, NAMES)
    return done, {run.data.params["graphs.fault"]: run for run in runs(root)}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_fault_of_the_tiny_model(root, first, row):
    _, found = first
    run = found[row.name]
    tags = run.data.tags
    assert tags["outcome"] == row.outcome
    assert row.reason in tags["reasons"]
    timed = [name for name in run.data.metrics if name.startswith(("latency", "throughput", "samples"))]
    if row.outcome == "ok":
        assert timed
        return
    assert timed == []
    log = artifact(root, run, "log.txt").read_text()
    assert len(log) <= isolate.LOG_LINES * (isolate.LINE_BYTES + 1)
    assert row.name == "loud" or f"about to {row.name}" in log


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_sweep_goes_on_and_says_what_is_missing(root, first):
    done, found = first
    assert len(found) == len(NAMES)
    assert found["none"].data.tags["outcome"] == "ok"
    assert done.returncode == max(row.code for row in ROWS)
    closing = done.stdout.splitlines()[-1]
    settled = [i for i, name in enumerate(NAMES) if name == "none" or faults.by_name(name).outcome == "ok"]
    assert closing.startswith(
        f"study adhoc: {len(settled)} of {len(NAMES)} points settled; missing: #1 error, #2 error"
    )
    assert processes(root / "pi0exp-") == [], "no orphans"
    assert list(root.glob("pi0exp-????????")) == [], "no scratch"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_next_sweep_measures_only_what_is_missing(root, first):
    done = sweep(root, REPEATED)
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1] == "study adhoc: 4 of 4 points settled, complete"
    counts = Counter(run.data.params["graphs.fault"] for run in runs(root))
    assert {name: counts[name] for name in REPEATED} == {"none": 1, "exception": 2, "device_oom": 2, "orphan": 1}
