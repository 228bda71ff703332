"""One point of a run or sweep: check it, look whether it is settled, measure it in a child, record it, show it."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pi0exp import compose, config, interrupts, plugins, subject
from pi0exp.card import card, console
from pi0exp.errors import UserError
from pi0exp.exhibits import machine_tags
from pi0exp.isolate import measure_isolated
from pi0exp.key import file_digest, point_key
from pi0exp.load import recover, settled_file, try_folder, write_record
from pi0exp.machine import Machine, tracking_uri
from pi0exp.measure import fingerprint, target_machine
from pi0exp.result import Outcome, Result, record
from pi0exp.title import title
from pi0exp.track import Store, Stored

LABELS = ("subject", "stack", "study")
"""Names that stand for other choices, which are there themselves."""
FRAME = ("name", "resume", "track", "report", "search", "changed")
"""What does not make a point, or says again what does: two that agree in everything else are one point."""


def measure_point(plain: dict[str, Any]) -> dict[str, Any]:
    """Measure the point that `plain` describes, unless it is settled; returns what the closing table needs.

    Raises UserError for what cannot be read or written, and KeyboardInterrupt once the run is marked as interrupted.
    """
    thing = subject.subject(plain)
    run, settings = config.run(plain), config.measure(plain)
    machine, lacking = target_machine(settings.device)
    thing.preflight()

    store = Store.open(run.track.uri or tracking_uri(), None if run.track.root is None else Path(run.track.root))
    results = None if run.track.results is None else Path(run.track.results)
    if results is not None:
        try_folder(results)
    with interrupts.held():
        recover(store, run.name)
    experiment = experiment_of(plain, thing)
    key, params = point_key(experiment, machine.identity()), run_params(plain, thing)
    name = title(params)
    if run.resume and (settled := measured_before(store, results, run.name, key)) is not None:
        return shown(settled.record, settled.run_id, settled=True)

    with interrupts.held(), store.spool.room(), tempfile.TemporaryDirectory(prefix="pi0exp-") as scratch:
        kept = Path(scratch)
        run_id = store.start(run.name, name, key, params, tags(machine, thing.numerics.name))

        def finish(result: Result) -> dict[str, Any]:
            # A child that died could not say what and where it was.
            result = replace(
                result,
                numerics=result.numerics or thing.numerics.name,
                fingerprint=result.fingerprint or fingerprint(machine),
            )
            made = record(key, run.name, params, experiment, result)
            stored(store, run_id, made)
            if results is not None and result.outcome is not Outcome.INTERRUPTED:
                filed(made, results, run_id)
            return made

        try:
            if reasons := lacking + thing.unmet(machine):
                result = Result(Outcome.UNSUPPORTED, reasons)
            else:
                with shown_progress(name) as progress:
                    result = measure_isolated(experiment, settings.timeout_s, progress, kept, on_gpu=machine.has_gpu)
        except KeyboardInterrupt as error:
            finish(Result(Outcome.INTERRUPTED, [f"stopped by {interrupts.cause(error)}"]))
            raise
        except BaseException as error:
            finish(Result(Outcome.ERROR, [f"{type(error).__name__}: {error}"]))
            raise
        made = finish(result)
        try:
            store.attach(run_id, kept)
        except UserError as error:  # of a store that was lost; the result itself waits for the next start
            tell(f"{error}; the profiler's trace is not kept")
        return shown(made, run_id, settled=False)


def measured_before(store: Store, results: Path | None, study: str, key: str) -> Stored | None:
    """The result of a point that need not be measured again: the store's, which is written to `results`, or that of a
    file there, which is brought into the store.
    """
    if (there := store.settled(study, key)) is not None:
        if results is not None:
            write_record(there.record, results)
        return there
    if results is None or (found := settled_file(results, study, key)) is None:
        return None
    path, made = found
    with interrupts.held():
        run_id, _ = store.import_record(made)
    tell(f"{path} was brought into the store")
    return Stored(run_id, made)


def filed(made: dict[str, Any], results: Path, run_id: str) -> None:
    """Write the result file of a point, but no failure over a result that is settled."""
    failed = not Outcome(made["outcome"]).settled
    if failed and (found := settled_file(results, made["study"], made["key"])) is not None:
        path, kept = found
        tell(f"{path} stays, which is {kept['outcome']}; this {made['outcome']} is in the store only, as run {run_id}")
        return
    try:
        write_record(made, results)
    except UserError as error:  # the next run of this point finds it settled, and writes it
        tell(f"{error}; the result is in the store only")


def stored(store: Store, run_id: str, made: dict[str, Any]) -> None:
    """Log a result. Where the store was lost since the run was opened, say where the result waits for the next start.

    Raises UserError where no disk takes it.
    """
    if made["outcome"] == Outcome.INTERRUPTED:  # no result; the run is told from its dead process too
        try:
            store.finish(run_id, made)
        except UserError as error:
            tell(f"{error}; the next start marks the run as interrupted")
        return
    path = store.spool.keep(run_id, made)
    try:
        store.finish(run_id, made)
    except UserError as error:
        tell(f"{error}; the result is kept in {path}, the next start brings it into the store")
    else:
        path.unlink(missing_ok=True)


def tell(text: str) -> None:
    """On one line of stderr."""
    print(f"pi0exp: {' '.join(text.split())}", file=sys.stderr, flush=True)


def experiment_of(plain: dict[str, Any], thing: subject.Subject | None = None) -> dict[str, Any]:
    """What makes the point: all that is asked, and of what it names the code of others and the content of files.

    thing: its subject, if there is one already, which has opened its files.

    Raises UserError for a file that cannot be read.
    """
    experiment = {name: part for name, part in plain.items() if name not in FRAME}
    experiment["names"] = {group: name for group, name in plain["names"].items() if group not in LABELS}
    sources = plugins.foreign_sources(experiment)
    files = file_digests(plain) | subject_digests(thing or subject.subject(plain))
    return experiment | ({"plugins": sources} if sources else {}) | ({"files": files} if files else {})


def file_digests(plain: dict[str, Any]) -> dict[str, str]:
    """Path -> SHA-256, in hex, of each file that a setting of an option names."""
    options = [config.option(group, plain[group]) for group in config.GROUPS if plain.get(group) is not None]
    paths = [path for option in options for _, part in option.parts() for path in part.files()]
    return _digests({path: Path(path) for path in paths})


def subject_digests(thing: subject.Subject) -> dict[str, str]:
    """Setting -> SHA-256, in hex, of the file that it names: weights, a recording. Where they lie is not part of it."""
    return _digests(thing.files())


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    try:
        return {name: file_digest(path) for name, path in files.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def run_params(plain: dict[str, Any], thing: subject.Subject) -> dict[str, str]:
    """One parameter a group with its option's name, the stack first, and the subject's; all else is in experiment.json.

    Options of single stages, and settings that are not as in the option's file, follow their group.
    """
    names = {name: str(option) for name, option in plain["names"].items() if name not in ("study", "subject")}
    what = {"subject": other} if (other := other_subject(plain)) else {}
    return stack_params(plain) | what | names | thing.params()


def other_subject(plain: dict[str, Any]) -> str:
    """The name of a subject that is not the one measured by default, the policy; "" for that one."""
    name = str(plain["names"].get("subject", ""))
    return "" if name == compose.defaults()["subject"] else name


def stack_params(plain: dict[str, Any]) -> dict[str, str]:
    """The part of `run_params` that is the stack, in the order of application."""
    given = plain["names"] | plain["changed"]
    return {name: given[name] for group in config.GROUPS for name in given if name.split(".")[0] == group}


def tags(machine: Machine, numerics: str) -> dict[str, str]:
    return machine_tags(fingerprint(machine)) | {"numerics": numerics}


def shown(made: dict[str, Any], run_id: str, settled: bool) -> dict[str, Any]:
    """Print the card; what the closing table needs."""
    console().print(card(made, run_id, settled), markup=False)
    if made["log"]:
        console().print("\n".join(made["log"].splitlines()[-12:]), markup=False, style="dim")
    kept = {name: made[name] for name in ("key", "params", "metrics", "outcome", "reasons", "numerics", "fingerprint")}
    return kept | {"run_id": run_id, "exit_code": Outcome(made["outcome"]).exit_code}


@contextmanager
def shown_progress(name: str) -> Iterator[Callable[[str], None]]:
    """One line that changes on a terminal, plain lines elsewhere."""
    screen = console()
    if not screen.is_terminal:
        yield lambda text: print(f"[{name}] {text}", file=sys.stderr, flush=True)
        return
    with screen.status(name) as status:
        yield lambda text: status.update(f"{name}  [dim]{text}")
