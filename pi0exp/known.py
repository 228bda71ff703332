"""What has been measured before, here or elsewhere: the records of the store, and result files of the repository.

Only reads: a store that is not there is not created.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pi0exp import compose
from pi0exp.config import RunConfig
from pi0exp.load import readable
from pi0exp.machine import Machine, tracking_uri
from pi0exp.result import measured_at
from pi0exp.roofline import Ceilings
from pi0exp.root import default_root
from pi0exp.track import Record, Store

RESULTS = compose.PACKAGE / "experiments" / "results"
"""Result files of the repository; a normal install has none."""


@dataclass(frozen=True)
class Known:
    """A record and where it was found: a run of a study, or a file."""

    where: str
    record: Record

    @property
    def gpu(self) -> str:
        return str(self.record["fingerprint"].get("gpu", "?"))

    @property
    def date(self) -> str:
        """Of the measurement, 2026-11-24."""
        return str(self.record["fingerprint"].get("date", ""))

    @property
    def when(self) -> str:
        """The same with the time, where the record has it."""
        return measured_at(self.record)


def known_records(run: RunConfig) -> list[Known]:
    """All records in the store that `run` names and in the result files, the latest first, each once.

    Of the store the studies that can be known by name: the run's own, those of the repository and of its results. The
    files are those of the repository and, as a run finds them settled, of its own `track.results`.
    Raises UserError for a store that cannot be read.
    """
    root = None if run.track.root is None else Path(run.track.root)
    stored = _stored(run.track.uri or tracking_uri(), root, run.name)
    found: dict[tuple[str, str], Known] = {}
    own = None if run.track.results is None else Path(run.track.results)
    others = () if own is None or own.resolve() == RESULTS.resolve() else _files(own)
    for known in (*stored, *_files(RESULTS), *others):
        found.setdefault((known.record["study"], known.record["key"]), known)
    return sorted(found.values(), key=lambda known: known.when, reverse=True)


@cache
def _stored(uri: str | None, root: Path | None, study: str) -> tuple[Known, ...]:
    """Read once, however many points of a sweep ask."""
    if not store_exists(uri, root):
        return ()
    store = Store.open(uri, root)
    folders = [folder.name for folder in RESULTS.iterdir() if folder.is_dir()] if RESULTS.is_dir() else []
    studies = dict.fromkeys([study, RunConfig.name, *compose.files()["study"], *sorted(folders)])
    return tuple(
        Known(f"study {name}, run {stored.run_id}", stored.record) for name in studies for stored in store.runs(name)
    )


def store_exists(uri: str | None, root: Path | None) -> bool:
    """Whether there is a store; opening a file that is not there would create it."""
    if uri is None:
        return ((root or default_root()) / "mlflow.db").is_file()
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return not uri.startswith("sqlite:///") or Path(path).is_file()


@cache
def _files(folder: Path) -> tuple[Known, ...]:
    """What cannot be read is told on stderr and left out: it says nothing of the point that is asked for."""
    return tuple(Known(_short(path), one) for path, one in readable([folder]))


def _short(path: Path) -> str:
    return (path.relative_to(compose.PACKAGE) if path.is_relative_to(compose.PACKAGE) else path).as_posix()


def same_point(records: Iterable[Known], experiment: dict[str, Any]) -> Iterator[Known]:
    """The records of this experiment, however it was measured and whatever the code of its plugins was."""
    wanted = comparable(experiment)
    return (known for known in records if comparable(known.record["experiment"]) == wanted)


def comparable(experiment: dict[str, Any]) -> dict[str, Any]:
    """Without how it was measured and by which code: what makes two records the same point of two studies.

    And without switches that are off, which an older record may not have yet: a new one is off where it is not set.
    """
    kept = {name: _without_off(part) for name, part in experiment.items() if name not in ("measure", "plugins")}
    return kept | {"names": {group: name for group, name in kept.get("names", {}).items() if group != "measure"}}


def _without_off(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {name: _without_off(value) for name, value in part.items() if value is not False and value is not None}


def known_ceilings(
    records: Iterable[Known], machine: Machine, experiment: dict[str, Any]
) -> tuple[Ceilings, Known] | None:
    """What a GPU was measured to reach in this precision, and the record that says so.

    The first record of this machine's GPU; of another one, if there is none.
    """
    fitting = [
        known
        for known in records
        if _METRICS[0] in known.record["metrics"]
        and known.record["experiment"].get("precision") == experiment.get("precision")
    ]
    chosen = next((known for known in fitting if known.gpu == machine.gpu), fitting[0] if fitting else None)
    if chosen is None:
        return None
    terabytes, teraflops = (chosen.record["metrics"][name] for name in _METRICS)
    return Ceilings(bytes_per_s=1e12 * terabytes, flops_per_s=1e12 * teraflops), chosen


_METRICS = ("ceilings/copy_tb_per_s", "ceilings/matrix_tflop_per_s")
