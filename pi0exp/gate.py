"""Do not regress:  python -m pi0exp.gate --baseline FILE

Measures the stacks of a baseline again, each in several processes, and says whether one is slower than its baseline
beyond noise and a margin, or computes with a larger error, or no longer ends ok. For CI.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from pi0exp import compose, config, interrupts, intervals
from pi0exp.baseline import Entry, foreign, read_baseline, write_baseline
from pi0exp.card import console
from pi0exp.comparison import ratio_text
from pi0exp.errors import UserError
from pi0exp.measure import target_machine
from pi0exp.result import CONFIG_ERROR, Outcome

STUDY = "gate"
MARGIN = 0.02
"""A larger share of time is a regression if it is beyond noise as well. Smaller drifts of a machine from day to day,
which runs of one day do not show, must not stop a change."""
ERROR_MARGIN = 0.25
"""A larger share of the error is one. Another order of summation moves the error of a stack up to here without any
fault: it is the limit of pi0exp.verify for it in the geometric mean (MEAN_RATIO)."""
REGRESSED = 1
"""The exit code."""
EPILOG = f"""examples:
  python -m pi0exp.gate --baseline experiments/gate.h200.json --update --stack h200_best workload=masked
  python -m pi0exp.gate --baseline experiments/gate.h200.json

exit codes: 0 no regression; {REGRESSED} a stack is slower, its error grew, or it no longer ends ok;
2 the baseline cannot be read, or is of another machine; 130 interrupted."""


@dataclass(frozen=True)
class Check:
    """What became of a stack. ratio: now / baseline. faults: one sentence for each regression."""

    name: str
    baseline_ms: float
    now_ms: float | None
    ratio: intervals.Interval | None
    baseline_error: float
    now_error: float | None
    faults: list[str]
    remark: str = ""


def measured(entries: dict[str, list[str]], processes: int, more: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What `processes` runs of each found: name -> metrics, outcome and reasons of each run.

    Repeats outermost, so that what drifts over minutes meets every stack.
    """
    from pi0exp.point import measure_point

    plains = {
        name: compose.from_words([*words, f"name={STUDY}", "resume=false", *more]) for name, words in entries.items()
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in entries}
    for _ in range(processes):
        for name, plain in plains.items():
            if all(run["outcome"] == Outcome.OK for run in found[name]):
                found[name].append(measure_point(plain))
    return found


def entry_of(words: list[str], runs: list[dict[str, Any]]) -> Entry:
    metrics = [run["metrics"] for run in runs]
    return Entry(words, [one["latency_ms/p50"] for one in metrics], [one.get("error/rel_l2", 0.0) for one in metrics])


def judge(name: str, entry: Entry, runs: list[dict[str, Any]], margin: float, error_margin: float) -> Check:
    """Hold the runs of today against the baseline."""
    before_ms, before_error = median(entry.p50_ms), max(entry.error)
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
        remark = f"noisy: a slowdown up to {100 * hidden:.1f} % would not be seen; more --processes show more"
    if word == intervals.FASTER:
        remark = f"faster by {100 * (1 / interval.ratio - 1):.1f} %: --update keeps it"
    if error > before_error * (1 + error_margin):
        faults.append(f"the error grew from {before_error:.3g} to {error:.3g}, by more than {100 * error_margin:g} %")
    return Check(name, before_ms, median(now.p50_ms), interval, before_error, error, faults, remark)


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
        names = given.stack or list(old) or best_stacks(given.words)
        entries = {name: Entry([f"stack={name}", *given.words], [], []) for name in names}
        if not given.stack and not given.words:
            entries |= old
    else:
        if given.words:
            raise UserError(f"{given.words[0]}: words go with --update; a baseline knows its own")
        if unknown := [name for name in given.stack if name not in old]:
            raise UserError(f"{given.baseline}: no stack {unknown[0]}; there are {', '.join(old)}")
        entries = {name: entry for name, entry in old.items() if not given.stack or name in given.stack}
    for entry in entries.values():
        machine, _ = target_machine(config.measure(compose.from_words(entry.words)).device)
        if machine_of and (reasons := foreign(machine_of, machine)):
            raise UserError(f"{given.baseline}: the baseline of another machine ({'; '.join(reasons)})")
    return entries


def gate(given: argparse.Namespace) -> int:
    """The command. Raises UserError."""
    if given.processes < intervals.PROCESSES or min(given.margin, given.error_margin) < 0:
        raise UserError(f"--processes must be {intervals.PROCESSES} or more, margins must not be negative")
    entries = chosen(given)
    more = [f"track.{name}={value}" for name, value in (("uri", given.uri), ("root", given.root)) if value is not None]
    with redirect_stdout(sys.stderr):
        found = measured({name: entry.words for name, entry in entries.items()}, given.processes, more)
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
        console().print(table(checks), markup=False)
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
        print(f"pi0exp: interrupted by {error or 'Ctrl-C'}", file=sys.stderr)
        return Outcome.INTERRUPTED.exit_code


if __name__ == "__main__":
    sys.exit(main())
