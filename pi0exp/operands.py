"""What a user names on the command line of compare and export: runs, studies, result files, named stacks -> records."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pi0exp import compose, config, subject
from pi0exp.errors import UserError
from pi0exp.known import Known, comparable, known_records, same_point, store_exists
from pi0exp.load import read_record, result_files
from pi0exp.machine import tracking_uri
from pi0exp.measure import target_machine
from pi0exp.result import Outcome
from pi0exp.root import default_root
from pi0exp.track import Record, Store, Stored

_RUN_ID = re.compile(r"[0-9a-f]{32}")
KINDS = ("study", "stack")
"""Prefixes, as in study=ladder, for a name that is both."""


@dataclass(frozen=True)
class Point:
    """One experiment on one machine by one code, and the processes that measured it, the latest first.

    Where some processes were ok, only these; otherwise the latest one.
    """

    known: tuple[Known, ...]

    @property
    def record(self) -> Record:
        return self.known[0].record

    @property
    def ok(self) -> bool:
        return bool(self.record["outcome"] == Outcome.OK)

    @property
    def where(self) -> list[str]:
        return [one.where for one in self.known]

    @property
    def name(self) -> str:
        return name_of(self.record["params"]) or str(self.record["key"])

    def values(self, metric: str) -> list[float]:
        """One of each process that has it."""
        return [float(one.record["metrics"][metric]) for one in self.known if metric in one.record["metrics"]]

    def value(self, metric: str) -> float | None:
        """The median of the processes."""
        return median(found) if (found := self.values(metric)) else None


@dataclass(frozen=True)
class Asked:
    """What is to be measured, with its name and parameters as a run's. numerics: the word that it declares."""

    name: str
    experiment: dict[str, Any]
    params: dict[str, str]
    numerics: str


def name_of(params: dict[str, str]) -> str:
    """Model, workload, and the stack's name or its options."""
    named = params.get("stack") or " ".join(f"{group}={params[group]}" for group in config.GROUPS if group in params)
    return " ".join(filter(None, [params.get("model"), params.get("workload"), named]))


def open_store(uri: str | None, root: Path | None) -> Store | None:
    """The store that is there; None where there is none, and none is created. Raises UserError if it cannot be read."""
    uri = uri or tracking_uri()
    return Store.open(uri, root) if store_exists(uri, root) else None


def store_name(uri: str | None, root: Path | None) -> str:
    return uri or tracking_uri() or str((root or default_root()) / "mlflow.db")


def points(known: Iterable[Known], ordered: bool = True) -> list[Point]:
    """By experiment and GPU, each measurement once; of each experiment those under the key of its latest record.

    ordered: those of one day without a time stand with the latest first. Otherwise, and if that matters, UserError.
    """
    unique: dict[str, Known] = {}
    for one in sorted(known, key=lambda one: one.when, reverse=True):
        unique.setdefault(identity(one.record), one)
    found: dict[tuple[str, str], list[Known]] = {}
    for one in unique.values():
        found.setdefault((_experiment(one.record), one.gpu), []).append(one)
    made = []
    for same in found.values():
        keyed = [one for one in same if one.record["key"] == same[0].record["key"]]
        others = [one for one in same if one not in keyed and one.when == same[0].when]
        if others and not ordered:
            raise UserError(
                f"{same[0].where} and {others[0].where}: one point, measured on one day under two keys (other code or"
                " versions): name the one that is meant"
            )
        made.append(Point(tuple([one for one in keyed if one.record["outcome"] == Outcome.OK] or keyed[:1])))
    return made


def identity(record: Record) -> str:
    """The same for two copies of one measurement, wherever they are kept: no two have the same samples."""
    return json.dumps([record[name] for name in ("key", "outcome", "metrics", "samples")], sort_keys=True)


def _experiment(record: Record) -> str:
    """A record's experiment, however it was measured, for comparison."""
    return repr(_sorted(comparable(record["experiment"])))


def _sorted(value: Any) -> Any:
    return [(key, _sorted(value[key])) for key in sorted(value)] if isinstance(value, dict) else value


@dataclass
class Operands:
    """Where names are looked up: a store, which may be missing, and for stacks the committed results.

    words: what is composed with a named stack, such as workload=masked.
    """

    uri: str | None
    root: Path | None
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.store = open_store(self.uri, self.root)

    def find(self, text: str) -> tuple[str, list[Point]]:
        """("study" or "point", the points) of A or B as it was given; commas join several runs or files of one point.

        Raises UserError that says what would do.
        """
        if "," in text and not Path(text).exists():
            return "point", [self._joined(text)]
        kind, found = self._one(text)
        return kind, points(found, ordered=not Path(text).is_dir())

    def _joined(self, text: str) -> Point:
        """Several processes of one point, each named by itself: all of them count, or none."""
        found = [known for part in text.split(",") for known in self._one(part)[1]]
        if len({identity(one.record) for one in found}) < len(found):
            raise UserError(f"{text}: the same measurement twice; each process counts once")
        if len(keys := {one.record["key"] for one in found}) > 1:
            raise UserError(
                f"{text}: {len(keys)} different points (experiment, machine or code); what commas join must be one"
            )
        [made] = points(found)
        if len(made.known) < len(found):
            raise UserError(f"{text}: some of them are not ok; join those that are")
        return made

    def check_words(self, *texts: str) -> None:
        """Raises UserError where there are words, and no stack to compose them with."""
        if self.words and not any(self._stack(text) for text in texts):
            raise UserError(f"{' '.join(self.words)}: goes with named stacks, and neither A nor B is one")

    def asked(self, text: str) -> Asked:
        """The experiment to measure again: of the record that is named, or of a named stack as it is today."""
        if (stack := self._stack(text)) is not None:
            return self.composed(stack)
        kind, found = self.find(text)
        if kind == "study" or len(found) != 1:
            raise UserError(f"{text}: --rerun measures two points; name a run, a result file or a stack")
        record = found[0].record
        numerics = subject.subject(record["experiment"]).numerics.name
        return Asked(name_of(record["params"]), record["experiment"], record["params"], numerics)

    def composed(self, stack: str) -> Asked:
        from pi0exp.point import experiment_of, run_params

        plain = compose.from_words([f"stack={stack}", *self.words])
        thing = subject.subject(plain)
        params = run_params(plain, thing)
        return Asked(name_of(params), experiment_of(plain, thing), params, thing.numerics.name)

    def _stack(self, text: str) -> str | None:
        """The stack's name if `text` means a stack."""
        kind, _, name = text.rpartition("=")
        if kind == "stack":
            if name not in compose.files()["stack"]:
                raise UserError(f"{text}: no such stack; there are {', '.join(compose.files()['stack'])}")
            return name
        is_stack = not kind and name in compose.files()["stack"] and not Path(text).exists()
        if is_stack and name in self._studies():
            raise UserError(f"{text} is a study and a stack: write study={text} or stack={text}")
        return name if is_stack else None

    def runs(self, study: str) -> list[Stored]:
        """Its finished runs, the latest first."""
        return [] if self.store is None else self.store.runs(study)

    def _studies(self) -> list[str]:
        return [] if self.store is None else self.store.studies()

    def _one(self, text: str) -> tuple[str, list[Known]]:
        path, study = Path(text), text.removeprefix("study=")
        if path.exists():
            return ("study" if path.is_dir() else "point"), [_of_file(file) for file in result_files([path])]
        if (stack := self._stack(text)) is not None:
            return "point", self._stored_stack(stack)
        if self.store is not None and _RUN_ID.fullmatch(text):
            if (stored := self.store.run(text)) is None:
                raise UserError(f"{text}: no finished run of this id in {store_name(self.uri, self.root)}")
            return "point", [Known(f"run {text}", stored.record)]
        if self.store is not None and study in self._studies():
            found = [Known(f"run {stored.run_id}", stored.record) for stored in self.runs(study)]
            if not found:
                raise UserError(f"{text}: the study has no finished run")
            return "study", found
        there = ", ".join(self._studies()) if self.store is not None else "there is no store"
        raise UserError(
            f"{text}: no result file, no stack, and no run or study in {store_name(self.uri, self.root)} ({there})"
        )

    def _stored_stack(self, stack: str) -> list[Known]:
        """The runs of this very stack on this GPU: of the store, and of the committed results where it has none."""
        wanted = self.composed(stack).experiment
        machine, _ = target_machine(config.measure(wanted).device)
        stored = [(one.started, name, one) for name in self._studies() for one in self.runs(name)]
        stored.sort(key=lambda found: found[0], reverse=True)
        local = [Known(f"study {name}, run {one.run_id}", one.record) for _, name, one in stored]
        track = config.TrackConfig(uri=self.uri, root=None if self.root is None else str(self.root))
        run = config.RunConfig(track=track)
        for among in (local, known_records(run)):
            if here := [known for known in same_point(among, wanted) if known.gpu == machine.gpu]:
                return here
        words = " ".join([f"stack={stack}", *self.words])
        raise UserError(
            f"{stack}: not measured on this machine ({machine.gpu}): run `python -m pi0exp {words}`, or use --rerun"
        )


def _of_file(file: Path) -> Known:
    return Known(str(file), read_record(file))
