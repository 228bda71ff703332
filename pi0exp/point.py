"""One point of a run or sweep: check it, look whether it is settled, measure it in a child, record it, show it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi0exp import config, subject
from pi0exp.card import card, console
from pi0exp.isolate import measure_isolated
from pi0exp.key import point_key
from pi0exp.load import write_record
from pi0exp.machine import Machine, tracking_uri
from pi0exp.measure import fingerprint, target_machine
from pi0exp.result import Outcome, Result, record
from pi0exp.track import Store

WORKLOAD_PARAMS = ("batch_size", "cameras_present", "prompt_tokens", "prompt_padded", "horizon", "num_steps", "seed")
SUBJECT_SECTIONS = ("subject", "model", "workload", "measure", *config.GROUPS)
"""What makes a point: two configurations that agree here are one point."""


def measure_point(plain: dict[str, Any]) -> dict[str, Any]:
    """Measure the point that `plain` describes, unless it is settled; returns what the closing table needs.

    Raises UserError for what cannot be read or written, and KeyboardInterrupt once the run is marked as interrupted.
    """
    thing = subject.subject(plain)
    settings = config.measure(plain)
    machine, lacking = target_machine(settings.device)
    thing.preflight()

    track = plain["track"]
    store = Store.open(track["uri"] or tracking_uri(), None if track["root"] is None else Path(track["root"]))
    experiment = {name: plain[name] for name in SUBJECT_SECTIONS if name in plain} | {"names": plain["names"]}
    key, study, params = point_key(experiment, machine.identity()), str(plain["name"]), run_params(plain)
    if plain["resume"] and (settled := store.settled(study, key)) is not None:
        return shown(settled.record, settled.run_id, settled=True)

    run_id = store.start(study, run_name(plain), key, params, tags(machine, thing.numerics.name))

    def finish(result: Result) -> dict[str, Any]:
        made = record(key, study, params, experiment, result)
        store.finish(run_id, made)
        if track["results"] is not None:
            write_record(made, Path(track["results"]))
        return made

    try:
        if reasons := lacking + thing.unmet(machine):
            result = Result(
                Outcome.UNSUPPORTED, reasons, numerics=thing.numerics.name, fingerprint=fingerprint(machine)
            )
        else:
            with shown_progress(run_name(plain)) as progress:
                result = measure_isolated(experiment, settings.timeout_s, progress)
    except KeyboardInterrupt:
        finish(Result(Outcome.INTERRUPTED, ["stopped by Ctrl-C"], fingerprint=fingerprint(machine)))
        raise
    except BaseException as error:
        finish(Result(Outcome.ERROR, [f"{type(error).__name__}: {error}"], fingerprint=fingerprint(machine)))
        raise
    return shown(finish(result), run_id, settled=False)


def run_params(plain: dict[str, Any]) -> dict[str, str]:
    """One parameter a group with its option's name, and the workload's numbers; the rest is in experiment.json."""
    params = {name: str(value) for name, value in plain["names"].items() if name != "study"}
    workload = plain["workload"]
    params |= {f"workload.{name}": str(workload[name]) for name in WORKLOAD_PARAMS}
    params["workload.cameras_present"] = "".join("1" if present else "0" for present in workload["cameras_present"])
    if (checkpoint := plain["model"].get("checkpoint")) is not None:
        params["model.checkpoint"] = str(checkpoint)
    return params


def run_name(plain: dict[str, Any]) -> str:
    """The stack's name if it has one, else its options that are not the plain ones."""
    names = plain["names"]
    plain_options = {
        "precision": "bf16",
        "image_masking": "keep",
        "fusion": "none",
        "gemm": "blas",
        "attention": "eager",
    }
    plain_options |= {"compile_mode": "none", "graphs": "none"}
    special = [
        f"{name}={value}"
        for name, value in names.items()
        if name.split(".")[0] in config.GROUPS and plain_options.get(name) != value
    ]
    return "  ".join([names["model"], names["workload"], names.get("stack") or " ".join(special) or "plain"])


def tags(machine: Machine, numerics: str) -> dict[str, str]:
    prints = fingerprint(machine)
    return {name: str(prints[name]) for name in ("gpu", "arch", "commit", "dirty")} | {"numerics": numerics}


def shown(made: dict[str, Any], run_id: str, settled: bool) -> dict[str, Any]:
    """Print the card; what the closing table needs."""
    console().print(card(made, run_id, settled), markup=False)
    if made["log"]:
        console().print("\n".join(made["log"].splitlines()[-12:]), markup=False, style="dim")
    kept = {name: made[name] for name in ("params", "metrics", "outcome", "reasons")}
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
