"""The store of results: MLflow, and nothing else knows it. One MLflow experiment a study, one run a point.

MLflow is imported when a store is opened, not before: it takes seconds, and a child that measures must not hold it.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from pi0exp import exhibits, spool
from pi0exp.backend import Database, import_mlflow, prepare, reach, told
from pi0exp.errors import UserError
from pi0exp.owner import Owner, this_process
from pi0exp.result import Outcome
from pi0exp.root import default_root
from pi0exp.title import title

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_T = TypeVar("_T")

Record = exhibits.Record

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What a study may be called; it names an MLflow experiment and a folder."""

RUNNING = "running"
"""The tag `outcome` of a run that is not finished."""

TAG_CHARACTERS = 4000
"""MLflow cuts at 8000 with a warning. Tags are for the table; the whole text is in result.json."""


@dataclass(frozen=True)
class Stored:
    """A point that was found in the store. started: when its run was opened, in milliseconds since 1970."""

    run_id: str
    record: Record
    started: int = field(default=0, compare=False)


class Store:
    """Results by study and key. Whatever goes wrong with the store itself is a UserError of one line."""

    def __init__(
        self, client: "MlflowClient", name: str, artifacts: Path | None, own: bool, there: Callable[[], None]
    ) -> None:
        self._client = client
        self._name = name
        self._artifacts = artifacts
        self._own = own
        self._there = there
        self._experiments: dict[str, str] = {}  # study -> experiment, which keeps its id
        self._started: dict[str, int] = {}  # run -> when, of those that were opened here
        self.spool = spool.Spool(*spool.folders(artifacts or default_root().absolute(), name, own))

    @classmethod
    def open(cls, uri: str | None = None, root: Path | None = None) -> Self:
        """The store at an MLflow tracking URI; without one, a SQLite file in root, created where there is none.

        That it can be written is tried here, by writing: after a measurement would be too late.
        """
        import_mlflow()
        from mlflow import MlflowClient
        from sqlalchemy.engine import URL, make_url
        from sqlalchemy.exc import ArgumentError

        folder = (root or default_root()).absolute()
        try:
            url = make_url(uri) if uri else URL.create("sqlite", database=str(folder / "mlflow.db"))
        except (ArgumentError, ValueError) as error:
            raise UserError(
                f"uri={uri} is no tracking URI: sqlite:////folder/mlflow.db or http://host:5000 is"
            ) from error
        name = url.render_as_string(hide_password=True)
        artifacts = None
        if url.get_backend_name() == "file":
            raise UserError(f"{name}: MLflow no longer keeps runs in plain files: write sqlite:////folder/mlflow.db")
        with told(name):
            if url.get_backend_name() == "sqlite":
                artifacts = prepare(url, folder if root or not uri else None)
            elif url.get_backend_name() in ("http", "https"):
                reach(url)
            target = url.render_as_string(hide_password=False) if artifacts else uri
            client = MlflowClient(tracking_uri=target, registry_uri=target)
            there = Database.of(url, client).check if artifacts else lambda: None
            if url.get_backend_name() in ("http", "https"):
                there = partial(reach, url)
            client.search_experiments(max_results=1)
        return cls(client, name, artifacts, own=not uri, there=there)

    def settled(self, study: str, key: str) -> Stored | None:
        """The latest run of this point that need not be repeated, if its record is still there."""
        for run in self._search(study, f"tags.key = '{key}'"):
            if run.data.tags.get("outcome") in {outcome.value for outcome in Outcome if outcome.settled} and (
                stored := self._stored(run)
            ):
                return stored
        return None

    def runs(self, study: str) -> list[Stored]:
        """All finished points of a study, the latest first; failed ones too."""
        return [stored for run in self._search(study, "") if (stored := self._stored(run))]

    def run(self, run_id: str) -> Stored | None:
        """The point that a run holds; None where there is no such run, or none that is finished."""
        from mlflow import MlflowException

        with told(self._name):
            try:
                found = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise
        return self._stored(found)

    def studies(self) -> list[str]:
        """The names of all studies, in the order of the alphabet."""
        names: list[str] = []
        token = None
        with told(self._name):
            while True:
                page = self._client.search_experiments(page_token=token)
                names += [experiment.name for experiment in page]
                if not (token := page.token):
                    return sorted(names)

    def start(self, study: str, name: str, key: str, params: dict[str, str], tags: dict[str, str]) -> str:
        """Open the run of a point before it is measured and return the run's id."""
        from mlflow.entities import Param

        tags = {"key": key, "study": study, "outcome": RUNNING, "owner": str(this_process()), **tags}
        with told(self._name):
            experiment_id = self._experiment(study)
            run = self._client.create_run(experiment_id, tags=_cut(tags), run_name=name)
            self._started[run.info.run_id] = int(run.info.start_time)
            for some in _chunks([Param(name, value) for name, value in params.items()], 100):
                self._client.log_batch(run.info.run_id, params=some)
            return str(run.info.run_id)

    def finish(self, run_id: str, record: Record) -> None:
        """Log what a point left behind and close its run. Doing it again, after a part of it, makes it whole.

        The outcome is written after the record: a run that says it is settled has its record. With it goes, in one
        transaction, what `mark_torn` wrote, which holds no longer. Raises UserError where the store was lost meanwhile.
        """
        from mlflow.entities import Metric, RunTag

        with told(self._name):
            self._there()
            # Of all times the one that a second attempt has too: MLflow drops a value that it has already.
            now = self._started.get(run_id) or int(self._client.get_run(run_id).info.start_time)
        # SQL turns infinity into a large number, and charts leave NaN out: neither goes there, the tag names them.
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        finite = [Metric(name, value, now, 0) for name, value in metrics.items() if math.isfinite(value)]
        samples = [
            Metric("samples/latency_ms", value, now, step)
            for step, value in enumerate(record["samples"].get("latency_ms", []))
        ]
        texts = exhibits.texts(record)
        tags = exhibits.tags(record, texts)
        if unfit := [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]:
            tags["nonfinite"] = ", ".join(unfit)
        outcome = Outcome(record["outcome"])
        with told(self._name):
            for path, text in texts.items():
                self._client.log_text(run_id, text, path)
            for path, figure in exhibits.figures(record):
                self._client.log_figure(run_id, figure, path)
            # As much at once as MLflow takes: on a server each call is several queries.
            labels = _chunks([RunTag(name, value) for name, value in _cut(tags).items()], 100)
            for some, chosen in zip_longest(_chunks(finite + samples, 900), labels, fillvalue=()):
                self._client.log_batch(run_id, metrics=some, tags=chosen)
            ended = {"outcome": outcome.value}
            if self._client.get_run(run_id).data.tags.get("torn"):
                ended |= {"torn": "", "reasons": tags["reasons"]}
            self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in _cut(ended).items()])
            self._client.set_terminated(run_id, _status(outcome))
            self._there()

    def mark_torn(self, study: str) -> int:
        """Close the runs of a study whose process is gone, as `interrupted`; returns how many there were.

        Runs of processes that still run stay as they are, and those of processes that cannot be seen from here: of
        other hosts and other containers. A torn import goes: its file is still there. `pi0exp.load.recover` first
        brings in the results that wait; one that comes later makes its run whole again.
        """
        torn = 0
        for run in list(self._search(study, "attributes.status = 'RUNNING'")):
            owner = Owner.parse(run.data.tags.get("owner", ""))
            if owner is None or owner.alive() is not False:
                continue
            torn += 1
            outcome = run.data.tags.get("outcome", RUNNING)
            with told(self._name):
                if outcome != RUNNING:  # killed between the last two steps
                    self._client.set_terminated(run.info.run_id, _status(Outcome(outcome)))
                elif run.data.tags.get("imported"):
                    self._client.delete_run(run.info.run_id)
                else:
                    reason = f"process {owner.pid} on {owner.host}, which measured it, was killed or died"
                    tags = {"torn": "true", "reasons": reason, "outcome": Outcome.INTERRUPTED.value}
                    for name, value in tags.items():
                        self._client.set_tag(run.info.run_id, name, value)
                    self._client.set_terminated(run.info.run_id, _status(Outcome.INTERRUPTED))
        return torn

    def complete(self, run_id: str, record: Record) -> None:
        """Log a result whose run was begun under this id but did not get it; in a new run if that one is gone."""
        from mlflow import MlflowException

        with told(self._name):
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run = None
        if run is None or run.info.lifecycle_stage != "active":
            begun = next(self._search(record["study"], f"tags.spooled = '{run_id}'"), None)
            tags = {"imported": "true", "spooled": run_id}
            name = title(record["params"])
            start = partial(self.start, record["study"], name, record["key"], record["params"], tags)
            self.finish(begun.info.run_id if begun else start(), record)
        elif run.data.tags.get("outcome") != record["outcome"] or run.info.status == "RUNNING":
            self.finish(run_id, record)

    def attach(self, run_id: str, folder: Path) -> None:
        """Keep the files in a folder with a run, as they are, beside the texts of its record."""
        with told(self._name):
            for file in sorted(folder.iterdir()):
                self._client.log_artifact(run_id, str(file), "files")

    def find(self, record: Record) -> str | None:
        """The run that holds this very record. Another result under the same key is a UserError; a failure is none to
        one that is settled.
        """
        settled = Outcome(record["outcome"]).settled
        for run in self._search(record["study"], f"tags.key = '{record['key']}'"):
            stored = self._stored(run)
            if stored is None:
                continue
            if _text(stored.record) == _text(record):
                return stored.run_id
            if Outcome(stored.record["outcome"]).settled or (run.data.tags.get("imported") and not settled):
                raise UserError(
                    f"{record['study']}/{record['key']}: run {stored.run_id} in {self._name} has another result "
                    "under this key; delete that run in MLflow to load this one"
                )
        return None

    def import_record(self, record: Record) -> tuple[str, bool]:
        """Bring in a point measured elsewhere. (run id, whether it is new): a record is brought in only once."""
        if run_id := self.find(record):
            return run_id, False
        name, tags = title(record["params"]), {"imported": "true"}
        run_id = self.start(record["study"], name, record["key"], record["params"], tags)
        try:
            self.finish(run_id, record)
        except BaseException:
            self._client.delete_run(run_id)
            raise
        return run_id, True

    def _experiment(self, study: str) -> str:
        from mlflow import MlflowException

        if not NAME.fullmatch(study):
            raise UserError(f"study={study!r}: use letters, digits, `_`, `-` and `.`")
        folder = self._artifacts / study if self._artifacts else None
        # As a URI: MLflow takes a `%41` in a plain path for an `A`.
        location = folder.as_uri() if folder else None
        experiment = self._client.get_experiment_by_name(study)
        if experiment is None:
            try:
                experiment = self._client.get_experiment(self._client.create_experiment(study, location))
            except MlflowException:
                # Somebody else may have created it in between.
                if (experiment := self._client.get_experiment_by_name(study)) is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise UserError(f"{self._name}: experiment {study} was deleted; restore it or choose another study")
        if self._own and experiment.artifact_location != location:
            raise UserError(
                f"{self._name}: the store was moved, the files of {study} belong in {experiment.artifact_location}; "
                "move it back or choose another root"
            )
        if folder and experiment.artifact_location == location:
            # MLflow would only find out when the first file is logged, after the measurement.
            folder.mkdir(parents=True, exist_ok=True)
        return str(experiment.experiment_id)

    def _search(self, study: str, where: str) -> Iterator["Run"]:
        token = None
        with told(self._name):
            if study not in self._experiments:
                if (experiment := self._client.get_experiment_by_name(study)) is None:
                    return
                self._experiments[study] = experiment.experiment_id
            while True:
                page = self._client.search_runs(
                    [self._experiments[study]], where, order_by=["attributes.start_time DESC"], page_token=token
                )
                yield from page
                if not (token := page.token):
                    return

    def _stored(self, run: "Run") -> Stored | None:
        """None where the run has no record: it still runs, it was killed, or its files were deleted."""
        from mlflow.artifacts import download_artifacts, list_artifacts

        run_id, tags = run.info.run_id, run.data.tags
        if tags.get("outcome") == RUNNING or (tags.get("torn") and tags.get("outcome") == Outcome.INTERRUPTED):
            return None  # what there is may be half of it
        with told(self._name), tempfile.TemporaryDirectory() as folder:
            # By the address that the run has: asked for by its run, a file costs a server twice as many queries.
            where, server = run.info.artifact_uri, self._client.tracking_uri
            if "result.json" not in {Path(file.path).name for file in list_artifacts(where, tracking_uri=server)}:
                return None
            file = download_artifacts(f"{where}/result.json", dst_path=folder, tracking_uri=server)
            text = Path(file).read_text()
        try:
            return Stored(run_id, json.loads(text), int(run.info.start_time))
        except ValueError as error:
            raise UserError(f"{self._name}: result.json of run {run_id} is torn ({error}); delete that run") from error


def _text(record: Record) -> str:
    """A record for comparison: as text, since NaN differs from itself. Earlier versions wrote no files."""
    return json.dumps({"files": {}} | record, sort_keys=True)


def _chunks(items: list[_T], size: int) -> Iterator[list[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _cut(tags: dict[str, str]) -> dict[str, str]:
    return {name: value[:TAG_CHARACTERS] for name, value in tags.items()}


def _status(outcome: Outcome) -> str:
    if outcome is Outcome.INTERRUPTED:
        return "KILLED"
    return "FINISHED" if outcome.settled else "FAILED"
