"""Compare two measurements with statistics:  python -m pi0exp.compare A B

A and B are run ids, studies, result files or folders of them, or named stacks. Prints what differs in the
configuration, then every metric with ratio, interval and verdict, then outcome, fidelity and the verdict as a whole.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from pi0exp import interrupts, intervals, pipes
from pi0exp.card import aligned, console
from pi0exp.comparison import HEADLINE, Comparison, Row, compare, interleaved, ratio_text
from pi0exp.errors import UserError
from pi0exp.known import comparable
from pi0exp.operands import Operands, Point
from pi0exp.result import CONFIG_ERROR, Outcome

EPILOG = f"""examples:
  python -m pi0exp.compare 8_compiled h200_best
  python -m pi0exp.compare 8_compiled h200_best --rerun workload=masked
  python -m pi0exp.compare before/stacks after/stacks --json

Ratios are B / A, verdicts are about B: faster, slower, no difference seen, or no claim.
Intervals hold {100 * intervals.CONFIDENCE:.0f} times in 100. Across processes nothing is claimed from fewer than
{intervals.PROCESSES} a side: measure again with resume=false, or let --rerun decide in one process.

exit codes: 0 compared, whatever the verdict; 2 what was named cannot be found or read; with --rerun also that of
the measurement: 3 unsupported, 4 wrong_numerics or unproven, 5 error, oom or timeout; 130 interrupted."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m pi0exp.compare",
        description="Compare two measurements: configuration, every metric with an interval, outcome and fidelity.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "run id, study, result file or folder, or named stack; commas join runs of one point"
    made.add_argument("a", metavar="A", help=f"the baseline: {what}")
    made.add_argument("b", metavar="B", help="what is compared with it, named alike")
    words = "what is composed with named stacks: workload=masked"
    made.add_argument("words", nargs="*", default=[], metavar="WORD", help=words)
    made.add_argument("--rerun", action="store_true", help="measure both now, taking turns in one process")
    made.add_argument("--rounds", type=int, help="with --rerun: rounds A B B A (default 20)")
    made.add_argument(
        "--margin",
        type=float,
        default=intervals.MARGIN,
        help="differences up to this share are none (default %(default)s)",
    )
    made.add_argument("--json", action="store_true", help="one JSON object")
    made.add_argument("--uri", help="MLflow tracking URI; default: the SQLite store in the root")
    made.add_argument("--root", type=Path, help="folder of the store; default: mlruns of the repository")
    return made


def stored(operands: Operands, a: str, b: str, margin: float) -> tuple[list[Comparison], list[str]]:
    """The comparisons, one a point that both have, and the points that only one of them has."""
    (kind_a, points_a), (kind_b, points_b) = operands.find(a), operands.find(b)
    if kind_a != kind_b:
        raise UserError(f"{a} is a {kind_a} and {b} a {kind_b}: compare two points, or two studies")
    if kind_a == "point":
        return [compare(points_a[0], points_b[0], margin)], []
    made, alone = [], []
    for point in points_a:
        same = [other for other in points_b if same_point(point, other)]
        # A study of several GPUs has a point once on each; with one that has another GPU it is compared across.
        same = [other for other in same if other.known[0].gpu == point.known[0].gpu] or same
        made += [compare(point, other, margin) for other in same]
        alone += [] if same else [f"only in {a}: {point.name}"]
    alone += [f"only in {b}: {other.name}" for other in points_b if not any(same_point(one, other) for one in points_a)]
    if not made:
        raise UserError(f"{a} and {b} have no point in common; name two points to compare different ones")
    return made, alone


def same_point(a: Point, b: Point) -> bool:
    return comparable(a.record["experiment"]) == comparable(b.record["experiment"])


def rerun(operands: Operands, a: str, b: str, rounds: int, margin: float) -> tuple[Comparison, Outcome]:
    """Both measured in one process."""
    from pi0exp.interleave import measure_pair_isolated

    first, second = operands.asked(a), operands.asked(b)
    result, found = measure_pair_isolated(first.experiment, second.experiment, rounds, _told)
    if result.log:
        print("\n".join(result.log.splitlines()[-12:]), file=sys.stderr)
    return interleaved(first, second, result, found, margin), result.outcome


def _told(text: str) -> None:
    print(text, file=sys.stderr)


def show(one: Comparison) -> None:
    """The whole comparison of a point, as text."""
    screen = console()
    screen.print(one.name, markup=False, style="bold")
    differing = _table(("differs", "A", "B"))
    for row in one.differences:
        differing.add_row(*row)
    screen.print(differing if one.differences else "no difference in the configuration", markup=False)
    screen.print()
    metrics = _table(("metric", "A", "B", "B / A", "verdict on B"))
    for line in one.rows:
        metrics.add_row(line.name, _number(line.a), _number(line.b), _ratio(line), line.verdict)
    screen.print(metrics, markup=False)
    lines: list[tuple[str, str]] = []
    places = (", ".join(one.where[0]), ", ".join(one.where[1]))
    for name, (first, second) in (("measured", places), ("outcome", one.outcomes), ("fidelity", one.fidelity)):
        lines += [(name, f"A {first}"), ("", f"B {second}")]
    screen.print(aligned([("", ""), *lines, ("verdict", one.text)]), markup=False, end="\n\n")


def _table(columns: tuple[str, ...]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold", no_wrap=name == columns[0])
    return made


def _ratio(row: Row) -> str:
    return "" if row.interval is None else ratio_text(row.interval).removeprefix("ratio ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def as_json(found: list[Comparison], alone: list[str], margin: float) -> str:
    """{"confidence", "margin", "points": one object each, "alone": points of one side only}."""
    shown: dict[str, Any] = {"confidence": intervals.CONFIDENCE, "margin": margin}
    return json.dumps(shown | {"points": [one.to_dict() for one in found], "alone": alone}, indent=2)


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_intermixed_args(arguments)
    interrupts.install()
    code = 0
    try:
        if given.rounds is not None and (not given.rerun or given.rounds < intervals.ROUNDS):
            raise UserError(f"--rounds {given.rounds}: it goes with --rerun and is {intervals.ROUNDS} or more")
        if not 0 <= given.margin < 1:
            raise UserError(f"--margin {given.margin}: a share, 0 or more and below 1")
        operands = Operands(given.uri, given.root, tuple(given.words))
        operands.check_words(given.a, given.b)
        alone: list[str] = []
        if given.rerun:
            from pi0exp.interleave import DEFAULT_ROUNDS

            made, outcome = rerun(operands, given.a, given.b, given.rounds or DEFAULT_ROUNDS, given.margin)
            found, code = [made], outcome.exit_code
        else:
            found, alone = stored(operands, given.a, given.b, given.margin)
    except UserError as error:
        print(f"pi0exp: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    except KeyboardInterrupt as error:
        print(f"pi0exp: interrupted by {interrupts.cause(error)}", file=sys.stderr)
        return Outcome.INTERRUPTED.exit_code
    if given.json:
        print(as_json(found, alone, given.margin))
        return code
    for one in found:
        show(one)
    for line in alone:
        print(line)
    if len(found) > 1:
        summary = _table(("verdict on B", "B / A", "point"))
        for one in found:
            [ratio] = [_ratio(row) for row in one.rows if row.name == HEADLINE] or [""]
            summary.add_row(one.verdict, ratio, one.name)
        console().print(summary, markup=False)
    return code


if __name__ == "__main__":
    pipes.leave(main)
