"""A small set of points in which every pair of choices occurs that can stand together, one line of words each.

    python experiments/covering.py --models pi0,pi05 measure=quick name=covering > points.txt
    while read -r words; do python -m pi0exp $words; done < points.txt

Faults of a stack are mostly faults of two options that meet. All pairs need some tens of points, all combinations
millions. Choices are read from conf/ and from installed plugins: each option of each group of the stack, for all stages
and for single ones; each switch of a section of switches that all options of a group have, as fusion.rewrites; models
and workloads. Words are added to each line. The same choices give the same points.

    --models A,B     names in conf/model; default: pi0,pi05
    --ready          only options that this machine can run; otherwise all, and lines may end as `unsupported`
    --without G=A,B  not these options of the group G; compile modes, say, which take a minute a point
    --least N        as many points at least, by covering pairs again in other company
    --excluded       the pairs instead that cannot stand together, a point each; all of them end as `unsupported`
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pi0exp import compose, config
from pi0exp.errors import UserError
from pi0exp.machine import this_machine
from pi0exp.option import STAGES, Option
from pi0exp.result import CONFIG_ERROR
from pi0exp.search.space import common_switches

Row = dict[str, str]
"""Factor -> its words of the command line; none where the factor is left alone."""
Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two choices of different factors, each (factor, words), in the order of the factors."""

CANDIDATES = 10
"""Rows that are tried for each pair; the best is taken. More make the set little smaller."""
ROWS = "workload=masked workload.batch_size=2 workload.prompt_padded=24"
"""A workload beside those of conf/workload: rows that share a batch, an absent camera, a padded prompt."""


@dataclass(frozen=True)
class Space:
    """What can be chosen, and what can stand together.

    factors: name -> its choices, the plain one first. clashes: why the choices of a whole row exclude each other.
    """

    factors: dict[str, tuple[str, ...]]
    clashes: Callable[[Row], list[str]]

    def fits(self, row: Row) -> bool:
        return not self.clashes(row)

    def pairs(self) -> list[Pair]:
        """Every two choices of different factors."""
        return [
            ((one, a), (other, b))
            for one, other in combinations(self.factors, 2)
            for a in self.factors[one]
            for b in self.factors[other]
        ]


def space(models: list[str], keep: Callable[[str, str, Option], bool]) -> Space:
    """The choices in conf/ and plugins for these models. keep(group, name, option): whether an option takes part.

    Raises UserError for an option that cannot be loaded.
    """
    plain, files = compose.defaults(), compose.files()
    options: dict[str, dict[str, Option]] = {}
    nodes: dict[str, dict[str, dict[str, Any]]] = {}
    with compose.session():
        for group in config.GROUPS:
            names = sorted(files[group], key=lambda name: name != plain[group])
            nodes[group] = {name: compose.option_node(group, name) for name in names}
            made = {name: config.option(group, node) for name, node in nodes[group].items()}
            options[group] = {name: option for name, option in made.items() if keep(group, name, option)}
    factors = {"model": tuple(f"model={name}" for name in models)}
    for group, named in options.items():
        factors[group] = tuple(f"{group}={name}" for name in named)
        for stage in STAGES if group in compose.STAGED else ():
            factors[f"{group}.{stage}"] = ("", *(f"{group}.{stage}={name}" for name in named))
        for switch in common_switches(nodes[group], list(named)):
            section, _, key = switch.partition(".")
            if not nodes[group][next(iter(named))][section][key]:  # as the plain option has it
                factors[f"{group}.{switch}"] = ("", f"{group}.{switch}=true")
    workloads = sorted(files["workload"], key=lambda name: name != plain["workload"])
    factors["workload"] = (*(f"workload={name}" for name in workloads), ROWS)

    own = {group: tuple(factor for factor in factors if factor.split(".")[0] == group) for group in options}

    @cache
    def made_of(group: str, choices: tuple[str, ...]) -> Option:
        changes: dict[str, object] = {}
        first, *others = zip(own[group], choices, strict=True)
        option = options[group][first[1].partition("=")[2]]
        for factor, words in others:
            _, name, *switch = factor.split(".")
            if words and switch:
                changes[name] = replace(changes.get(name) or getattr(option, name), **{switch[0]: True})
            elif words:
                changes[name] = options[group][words.partition("=")[2]]
        return replace(option, **changes)

    def clashes(row: Row) -> list[str]:
        stack = config.Stack(
            **{group: made_of(group, tuple(row[factor] for factor in own[group])) for group in config.GROUPS}
        )
        return [f"{where}: {reason}" for where, option in stack.parts() for reason in option.clashes(stack)]

    return Space(factors, clashes)


def pairs_of(row: Row) -> Iterator[Pair]:
    """All pairs that stand in a row."""
    return combinations(row.items(), 2)


def covering(space: Space, least: int = 0) -> tuple[list[Row], dict[Pair, Row]]:
    """Rows that fit and hold each pair that can stand, `least` of them at least; and a row for each other pair.

    Greedy: each row is the one of several candidates that holds most pairs which no row held before. A pair cannot
    stand if no row fits that holds it and has the plain choices beside it, but for two.
    """
    chance, rows, held, excluded = random.Random(0), [], set(), {}
    missing, again = dict.fromkeys(space.pairs()), False
    while (missing and not again) or len(rows) < least:
        if not missing:  # once more, beside others
            missing, again = dict.fromkeys(sorted(held)), True
        first = next(iter(missing))
        plain = {name: choices[0] for name, choices in space.factors.items()} | dict(first)
        if (start := _fitting(space, plain, [name for name, _ in first])) is None:
            excluded[first] = plain
            del missing[first]
            continue
        made = [_candidate(space, start, first, missing, chance) for _ in range(CANDIDATES)]
        best = max(made, key=lambda row: sum(pair in missing for pair in pairs_of(row)))
        rows.append(best)
        for pair in pairs_of(best):
            held.add(pair)
            missing.pop(pair, None)
    return rows, {pair: row for pair, row in excluded.items() if pair not in held}


def _fitting(space: Space, row: Row, fixed: list[str]) -> Row | None:
    """The row with no, one or two choices changed outside `fixed`, so that it fits; None if that does not help.

    The first change has to take a reason away, though it may bring another, which the second takes away.
    """
    changes = [(name, choice) for name in space.factors if name not in fixed for choice in space.factors[name][1:]]
    if not (reasons := set(space.clashes(row))):
        return row
    once = [made for name, choice in changes if reasons - set(space.clashes(made := row | {name: choice}))]
    twice = (made | {name: choice} for made in once for name, choice in changes)
    return next((made for made in chain(once, twice) if space.fits(made)), None)


def _candidate(space: Space, start: Row, first: Pair, missing: dict[Pair, None], chance: random.Random) -> Row:
    """A row around a pair: from one that fits, factor after factor in any order the choice that brings most missing
    pairs and fits beside the others' choices. There always is one, that of `start`.
    """
    row, order = dict(start), list(space.factors)
    settled = [name for name, _ in first]
    for name in chance.sample(order, len(order)):
        if name in settled:
            continue

        def gain(choice: str, name: str = name) -> int:
            both = ((name, choice, other, row[other], order.index(name) < order.index(other)) for other in settled)
            pairs = (((a, x), (b, y)) if forward else ((b, y), (a, x)) for a, x, b, y, forward in both)
            return sum(pair in missing for pair in pairs)

        choices = chance.sample(space.factors[name], len(space.factors[name]))
        choices.sort(key=gain, reverse=True)
        row[name] = next(choice for choice in choices if space.fits(row | {name: choice}))
        settled.append(name)
    return row


def words_of(row: Row) -> list[str]:
    """The row as words of the command line."""
    return [word for words in row.values() for word in words.split()]


def main(arguments: list[str] | None = None) -> int:
    usage, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=usage, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="pi0,pi05")
    parser.add_argument("--ready", action="store_true")
    parser.add_argument("--without", action="append", default=[], metavar="GROUP=NAME,...")
    parser.add_argument("--least", type=int, default=0)
    parser.add_argument("--excluded", action="store_true")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args(arguments)
    machine = this_machine()
    left_out = {
        (group, name) for group, _, names in (one.partition("=") for one in given.without) for name in names.split(",")
    }

    def keep(group: str, name: str, option: Option) -> bool:
        return (group.split(".")[0], name) not in left_out and not (given.ready and option.unmet(machine))

    try:
        made = space(given.models.split(","), keep)
    except UserError as error:
        print(f"pi0exp: {error}", file=sys.stderr)
        return CONFIG_ERROR
    rows, excluded = covering(made, given.least)
    for row in excluded.values() if given.excluded else rows:
        print(" ".join([*words_of(row), *given.words]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
