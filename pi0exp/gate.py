"""Do not regress:  python -m pi0exp.gate --baseline FILE

Measures the stacks of a baseline again, each in several processes, and says whether one is slower than its baseline
beyond noise and a margin, or computes with a larger error, or no longer ends ok. For CI.

A slowdown is one if both hold: the interval of now / baseline lies above 1, and the ratio exceeds the margin. The runs
are kept in the store, as study `gate`.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.table import Table

from pi0exp import compose, config, interrupts, intervals, pipes
from pi0exp.baseline import Entry, changed, foreign, read_baseline, try_baseline, write_baseline
from pi0exp.card import show
from pi0exp.comparison import ratio_text
from pi0exp.errors import UserError
from pi0exp.measure import fingerprint, target_machine
from pi0exp.result import CONFIG_ERROR, Outcome

STUDY = "gate"
MARGIN = 0.02
"""A larger share of time is a regression if it is beyond noise as well. Smaller drifts of a machine from day to day,
which runs of one day do not show, must not stop a change."""
ERROR_MARGIN = 0.25
"""A larger share of the error is one. Another order of summation moves the error of a stack up to here without any
fault: it is the limit of pi0exp.verify for it in the geometric mean (MEAN_RATIO)."""
LATENCY, ERROR = "latency_ms/p50", "error/rel_l2"
REGRESSED = 1
"""The exit code."""
EPILOG = f"""examples:
  python -m pi0exp.gate --baseline experiments/gate.h200.json --update --stack h200_best workload=masked
  python -m pi0exp.gate --baseline experiments/gate.h200.json

--update measures the stacks that --stack names, with the WORDs; without both, those that the baseline has, or the
stacks called best where there is none. It overwrites their entries and leaves the others.

exit codes: 0 no regression; {REGRESSED} a stack is slower, its error grew, or it no longer ends ok;
2 the baseline cannot be read or written, or is of another machine; 130 interrupted."""


@dataclass(frozen=True)
class Check:
    """What became of a stack. ratio: now / baseline. faults: one sentence for each regression.

    changed: of driver, versions and code, since the baseline.
    """

    name: str
    baseline_ms: float
    now_ms: float | None
    ratio: intervals.Interval | None
    baseline_error: float
    now_error: float | None
    faults: list[str]
    remark: str = ""
    changed: list[str] = field(default_factory=list)


def measured(entries: dict[str, Entry], processes: int, track: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """What `processes` runs of each found: name -> metrics, outcome and reasons of each run. track: which store.

    Repeats outermost, so that what drifts over minutes meets every stack.
    """
    from pi0exp.point import measure_point

    plains = {
        name: compose.from_words([*entry.words, f"name={STUDY}", "resume=false"]) for name, entry in entries.items()
    }
    for plain in plains.values():
        plain["track"] |= track
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in entries}
    for _ in range(processes):
        for name, plain in plains.items():
            if all(run["outcome"] == Outcome.OK for run in found[name]):
                found[name].append(measure_point(plain))
    return found


def entry_of(words: list[str], runs: list[dict[str, Any]]) -> Entry:
    """Of runs that are ok. Raises UserError where one says nothing of its error: it could grow unseen."""
    metrics = [run["metrics"] for run in runs]
    if not all(ERROR in one for one in metrics):
        raise UserError(f"{' '.join(words)}: its runs have no {ERROR}, which a gate needs")
    machine, _ = target_machine(config.measure(compose.from_words(words)).device)
    return Entry(words, [one[LATENCY] for one in metrics], [one[ERROR] for one in metrics], fingerprint(machine))


def judge(name: str, entry: Entry, runs: list[dict[str, Any]], margin: float, error_margin: float) -> Check:
    """Hold the runs of today against the baseline."""
    before_ms, before_error = geometric_mean(entry.p50_ms), max(entry.error)
    if failed := [run for run in runs if run["outcome"] != Outcome.OK]:
        fault = f"ended as {failed[0]['outcome']}: {'; '.join(failed[0]['reasons'])}"
        return Check(name, before_ms, None, None, before_error, None, [fault])
    now = entry_of(entry.words, runs)
    interval, error = intervals.of_processes(entry.p50_ms, now.p50_ms), max(now.error)
    word, faults, remark = intervals.word(interval, margin), [], ""
    if word == intervals.SLOWER:
        faults.append(
            f"slower by {100 * (interval.ratio - 1):.1f} %, beyond noise and the margin of {100 * margin:g} %"
        )
    if interval.low is not None and (hidden := interval.ratio / interval.low - 1) > margin:
        size = f"up to {100 * hidden:.1f} %" if hidden < 1 else f"even to {hidden + 1:.1f} times as long"
        remark = f"noisy: a slowdown {size} would not be seen; more --processes show more"
    if word == intervals.FASTER:
        remark = f"faster by {100 * (1 / interval.ratio - 1):.1f} %: --update keeps it"
    if error > before_error * (1 + error_margin):
        faults.append(f"the error grew from {before_error:.3g} to {error:.3g}, by more than {100 * error_margin:g} %")
    others = changed(entry.fingerprint, now.fingerprint)
    now_ms = geometric_mean(now.p50_ms)  # whose ratio is the interval's
    return Check(name, before_ms, now_ms, interval, before_error, error, faults, remark, others)


def best_stacks(words: Sequence[str]) -> list[str]:
    """The stacks called best that this machine can run."""
    from pi0exp import subject

    names = []
    for name in compose.files()["stack"]:
        if name.endswith("_best"):
            plain = compose.from_words([f"stack={name}", *words])
            machine, lacking = target_machine(config.measure(plain).device)
            names += [] if lacking or subject.subject(plain).unmet(machine) else [name]
    if not names:
        raise UserError("no stack called best can run on this machine; name one with --stack")
    return names


def table(checks: list[Check]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in ("stack", "baseline ms", "now ms", "now / baseline", "error", "now", "verdict"):
        made.add_column(name, overflow="fold")
    for one in checks:
        times = f"{one.baseline_ms:.3f}", "-" if one.now_ms is None else f"{one.now_ms:.3f}"
        ratio = "-" if one.ratio is None else ratio_text(one.ratio).removeprefix("ratio ")
        errors = f"{one.baseline_error:.2e}", "-" if one.now_error is None else f"{one.now_error:.2e}"
        made.add_row(one.name, *times, ratio, *errors, "; ".join(one.faults) or one.remark or "no regression")
    return made


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m pi0exp.gate",
        description="Measure the stacks of a baseline again and say whether one has become slower or less accurate.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--baseline", type=Path, required=True, metavar="FILE", help="the baseline, a JSON file")
    made.add_argument("--update", action="store_true", help="measure, and write what was found as the baseline")
    made.add_argument("--stack", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    made.add_argument(
        "words", nargs="*", metavar="WORD", help="with --update: composed with the stacks: workload=masked"
    )
    made.add_argument(
        "--processes", type=int, default=intervals.PROCESSES, help="runs of each stack (default and least %(default)s)"
    )
    made.add_argument("--margin", type=float, default=MARGIN, help="share of time (default %(default)s)")
    made.add_argument("--error-margin", type=float, default=ERROR_MARGIN, help="share of error (default %(default)s)")
    made.add_argument("--json", action="store_true", help="one JSON object on stdout, the runs on stderr")
    made.add_argument("--uri", help="MLflow tracking URI; default: the SQLite store in the root")
    made.add_argument("--root", type=Path, help="folder of the store; default: mlruns of the repository")
    return made


def chosen(given: argparse.Namespace) -> dict[str, Entry]:
    """The entries to measure, by name; without numbers where they are new. Raises UserError."""
    machine_of, old = read_baseline(given.baseline) if given.baseline.exists() or not given.update else ({}, {})
    if given.update:
        try_baseline(given.baseline)
        if old and not given.stack and not given.words:
            entries = old
        else:
            new = [Entry([f"stack={name}", *given.words]) for name in given.stack or best_stacks(given.words)]
            entries = {entry.name: entry for entry in new}
    else:
        if given.words:
            raise UserError(f"{given.words[0]}: words go with --update; a baseline knows its own")
        stacks = {entry.stack for entry in old.values()}
        if unknown := [name for name in given.stack if name not in stacks]:
            raise UserError(f"{given.baseline}: no stack {unknown[0]}; there are {', '.join(sorted(stacks))}")
        entries = {name: entry for name, entry in old.items() if not given.stack or entry.stack in given.stack}
    for entry in entries.values():
        machine, _ = target_machine(config.measure(compose.from_words(entry.words)).device)
        if machine_of and (reasons := foreign(machine_of, machine)):
            raise UserError(f"{given.baseline}: the baseline of another machine ({'; '.join(reasons)})")
    return entries


def gate(given: argparse.Namespace) -> int:
    """The command. Raises UserError."""
    if given.processes < intervals.PROCESSES:
        raise UserError(f"--processes {given.processes}: {intervals.PROCESSES} or more say something of their spread")
    for name, value in (("--margin", given.margin), ("--error-margin", given.error_margin)):
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} {value}: a share, 0 or more")
    entries = chosen(given)
    track = {name: str(value) for name, value in (("uri", given.uri), ("root", given.root)) if value is not None}
    with redirect_stdout(sys.stderr):
        found = measured(entries, given.processes, track)
    if given.update:
        for name, runs in found.items():
            if failed := [run for run in runs if run["outcome"] != Outcome.OK]:
                raise UserError(f"{name} ended as {failed[0]['outcome']}: nothing is written to {given.baseline}")
        _, old = read_baseline(given.baseline) if given.baseline.exists() else ({}, {})
        new = {name: entry_of(entries[name].words, runs) for name, runs in found.items()}
        machine, _ = target_machine(config.measure(compose.from_words(next(iter(new.values())).words)).device)
        write_baseline(given.baseline, machine, old | new)
        line = json.dumps({"written": str(given.baseline), "points": list(new)})
        print(line if given.json else f"{given.baseline}: {', '.join(new)} written")
        return 0
    checks = [judge(name, entries[name], runs, given.margin, given.error_margin) for name, runs in found.items()]
    regressed = any(one.faults for one in checks)
    if given.json:
        margins = {"margin": given.margin, "error_margin": given.error_margin, "confidence": intervals.CONFIDENCE}
        print(json.dumps({"regressed": regressed, **margins, "checks": [asdict(one) for one in checks]}, indent=2))
    else:
        show(table(checks))
        for line in dict.fromkeys(text for one in checks for text in one.changed):
            print(f"since the baseline: {line}")
    return REGRESSED if regressed else 0


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_intermixed_args(arguments)
    interrupts.install()
    try:
        return gate(given)
    except UserError as error:
        print(f"pi0exp: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    except KeyboardInterrupt as error:
        print(f"pi0exp: interrupted by {interrupts.cause(error)}", file=sys.stderr)
        return Outcome.INTERRUPTED.exit_code


if __name__ == "__main__":
    pipes.leave(main)
