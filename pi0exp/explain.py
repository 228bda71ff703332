"""measure=explain: what a point would do, what it needs, and whether it is measured already. Measures nothing.

The stack is applied to a model without numbers (torch's meta device), through the very calls that a measurement makes,
so what is told is what the options say that they did. Functions that are only wrapped, such as those to be compiled or
captured, are never called. Nothing is written to the store.
"""

from typing import Any

from rich.table import Table

from pi0exp import build, config
from pi0exp.card import aligned, asked, console, differing, machine_line
from pi0exp.key import point_key
from pi0exp.known import Known, known_ceilings, known_records, same_point
from pi0exp.machine import Machine, kept_environment
from pi0exp.measure import fingerprint, target_machine
from pi0exp.option import Option
from pi0exp.outcomes import EXPLAINED
from pi0exp.point import experiment_of, run_params
from pi0exp.policy import Policy
from pi0exp.policy_subject import PolicySubject
from pi0exp.result import Outcome
from pi0exp.roofline import Ceilings, floor_ms
from pi0exp.subject import StageWork, Subject, subject

Rows = list[tuple[str, str]]
"""Lines of a name and a text; a line without a name goes on with the one above."""


def explain_point(plain: dict[str, Any]) -> dict[str, Any]:
    """Print what can be told of the point that `plain` describes; returns what the closing table needs.

    Raises UserError for what a measurement would refuse too: settings and inputs.
    """
    thing, run = subject(plain), config.run(plain)
    machine, lacking = target_machine(config.measure(plain).device)
    thing.preflight()
    params, reasons = run_params(plain, thing), lacking + thing.unmet(machine)

    experiment, records = experiment_of(plain, thing), known_records(run)
    same = list(same_point(records, experiment))
    here = [known for known in same if _is_of_this(known, experiment, machine)]
    elsewhere = [known for known in same if known not in here]
    work, ceilings = thing.work(), known_ceilings(records, machine, experiment)

    rows = [*asked(params), ("machine", machine_line(fingerprint(machine)))]
    clashes = _clashes(thing) if isinstance(thing, PolicySubject) else []
    rows += _rows("can run", ["no", *(text for text in reasons if text not in clashes)] if reasons else ["yes"])
    rows += _rows("excluded", clashes)
    rows += _rows("numerics", _numerics(thing))
    rows += _stack(thing) if isinstance(thing, PolicySubject) else []
    rows += _rows("work", [_work(stage) for stage in work])
    rows += _rows("floor", _floor(work, ceilings, machine)) if work else []
    rows += _rows("measured", _measured(here, "not by this code on this machine"))
    rows += _rows("elsewhere", _measured(elsewhere, "")) if elsewhere else []
    console().print(aligned(rows), markup=False, end="\n\n")

    told = {
        "numerics": thing.numerics.name,
        "floor_ms": sum(floor_ms(work, ceilings[0]).values()) if work and ceilings else None,
        "settled": sorted({_how(known) for known in here if Outcome(known.record["outcome"]).settled}),
        "p50_ms": next((p50 for known in here if (p50 := _p50(known)) is not None), None),
    }
    made = {"metrics": {}, "outcome": EXPLAINED, "reasons": reasons, "exit_code": 0, "params": params}
    return made | {EXPLAINED: told}


def _rows(name: str, lines: list[str]) -> Rows:
    return [(name if i == 0 else "", line) for i, line in enumerate(lines)]


def _numerics(thing: Subject) -> list[str]:
    """The word of the whole, and the bound where one is stated."""
    bound = build.bound(thing.stack) if isinstance(thing, PolicySubject) else None
    text = f"{thing.numerics.name}: {thing.numerics.value}"
    return [text if bound is None else f"{text}, relative L2 error at most {bound:g}"]


# ---- the stack


def _clashes(subject: PolicySubject) -> list[str]:
    """Which options exclude each other; also among the reasons why the point cannot run."""
    stack = subject.stack
    return [f"{group}: {reason}" for group, option in stack.parts() for reason in option.clashes(stack)]


def _stack(subject: PolicySubject) -> Rows:
    """Of each group: its options' word, and what they do to the model."""
    done = outline(subject)
    rows: Rows = []
    for group, option in subject.stack.options():
        words = ", ".join(f"{stage} {part.numerics.name}".strip() for stage, part in option.parts())
        lines = done.get(group, ["leaves the model as it is"])
        rows += _rows(group, [f"{words}: {lines[0]}", *lines[1:]])
    return rows


def outline(subject: PolicySubject) -> dict[str, list[str]]:
    """Group -> what its option does to the policy, by its own words, for those that do something.

    An option that cannot be applied here (its package is not installed, it looks at values) is left out of the stack
    and says so; the others are then applied without it.
    """
    failed: dict[str, str] = {}
    while True:
        policy = subject.without_numbers()
        for group, option in subject.stack.options():
            if group in failed:
                continue
            if (error := _apply(policy, group, option)) is not None:
                failed[group] = error
                break
        else:
            return policy.applied | {group: [f"cannot be applied here: {error}"] for group, error in failed.items()}


def _apply(policy: Policy, group: str, option: Option) -> str | None:
    """Apply an option; what stopped it, on one line, if anything did."""
    policy.begin(group)
    try:
        with kept_environment():  # what an option sets for its library would reach the points that are measured later
            option.apply(policy)
    except Exception as error:  # whatever a library raises where it cannot work
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return None


# ---- work and time


def _work(stage: StageWork) -> str:
    times = f" {stage.count} times" if stage.count > 1 else ""
    return f"{stage.name}{times} {_figure(stage.flops / 1e9)} GFLOP, {_figure(stage.bytes_moved / 1e6)} MB"


def _figure(value: float) -> str:
    """Two decimals, and of what is small two digits that count: of a tiny model something is left to read."""
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def _floor(work: list[StageWork], ceilings: tuple[Ceilings, Known] | None, machine: Machine) -> list[str]:
    """The least time of a call, by whose ceilings."""
    if ceilings is None:
        return ["unknown: no GPU's ceilings have been measured in this precision"]
    reached, known = ceilings
    stages = floor_ms(work, reached)
    parts = " + ".join(f"{name} {_figure(value)}" for name, value in stages.items())
    rates = f"{reached.bytes_per_s / 1e12:.2f} TB/s, {reached.flops_per_s / 1e12:.0f} TFLOP/s"
    whose = "this GPU" if known.gpu == machine.gpu else f"{known.gpu}, not of this machine"
    return [f"{_figure(sum(stages.values()))} ms = {parts}", f"by the ceilings of {whose}: {rates} ({known.where})"]


# ---- what is measured


def _is_of_this(known: Known, experiment: dict[str, Any], machine: Machine) -> bool:
    """Whether this code measured it on this machine, whatever the settings of the measurement were."""
    record = known.record
    if record["experiment"].get("plugins") != experiment.get("plugins"):
        return False
    return bool(record["key"] == point_key(record["experiment"], machine.identity()))


def _measured(records: list[Known], otherwise: str) -> list[str]:
    return [_result(known) for known in records] or [otherwise]


def _result(known: Known) -> str:
    record, prints, p50 = known.record, known.record["fingerprint"], _p50(known)
    what = f"p50 {p50:.2f} ms" if p50 is not None else "; ".join(record["reasons"])
    code = str(prints.get("commit") or "no commit")[:10]
    return f"{record['outcome']}, {what} ({known.gpu}, {known.date}, {code}, {_how(known)}; {known.where})"


def _how(known: Known) -> str:
    """With which settings it was measured, as on the command line: a run with others measures again."""
    params = known.record["params"]
    return " ".join(f"{name}={value}" for name, value in params.items() if name.split(".")[0] == "measure") or "?"


def _p50(known: Known) -> float | None:
    value = known.record["metrics"].get("latency_ms/p50")
    return None if value is None else float(value)


def table(rows: list[dict[str, Any]]) -> Table:
    """The closing table of a sweep: one row a point, the columns that differ between the points."""
    varying = differing(rows)
    made = Table(box=None, pad_edge=False)
    for name in ("#", *varying, "numerics"):
        made.add_column(name, overflow="fold")
    for name in ("floor ms", "p50 ms"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("can run", overflow="fold")
    for i, row in enumerate(rows):
        told = row.get(EXPLAINED, {})
        numbers = [_figure(told[name]) if told.get(name) is not None else "-" for name in ("floor_ms", "p50_ms")]
        word = row["outcome"] if EXPLAINED not in row else "no" if row["reasons"] else "yes"
        can = ": ".join(filter(None, [word, "; ".join(row["reasons"])]))
        cells = [str(row["params"].get(name, "-")) for name in varying]
        made.add_row(str(i), *cells, told.get("numerics", "-"), *numbers, can)
    return made
