"""A search from its plan to its file: the points, the closing comparison, what is printed and what is written."""

from collections.abc import Sequence
from typing import Any

from pi0exp import compose, outcomes
from pi0exp.card import console
from pi0exp.point import tell
from pi0exp.result import Outcome
from pi0exp.search import closing, loop, shown, stack_file
from pi0exp.search.plan import Plan
from pi0exp.whole import write_whole


def run(plan: Plan, measure: loop.Measure, command: str) -> None:
    """Without any stack that is ok nothing is written, and the exit code is that of the points."""
    settings, plain = plan.settings, compose.defaults()

    def point(words: Sequence[str]) -> dict[str, Any]:
        made = measure(words)
        made["trial"] = shown.short(words, plain)
        return made

    if plan.explain:
        show(shown.space_text(plan.space, plan.named, plan.absent))
        for one in plan.named:
            measure(one.words)
        return
    tell(f"search: the result goes to {plan.path}" if plan.path else f"search: nothing is written: {plan.unwritten}")
    for name, reason in plan.absent.items():
        tell(f"search: stack={name} takes no part: {reason}")

    found = loop.search(plan.space, plan.named, settings, point)
    contestants = closing.candidates(found.trials, settings)
    if contestants and plan.standing is not None:
        contestants = closing.with_standing(contestants, plan.standing)
    ranked = closing.ranking(closing.measured_again(contestants, settings, plan.seed, point), settings.objectives)
    if not ranked:
        where = "in the closing comparison" if contestants else "of the search"
        show(f"no point {where} is ok and computes the same actions, so there is no best one")
        return
    front = closing.front(ranked, settings.objectives)
    show(shown.result(found, ranked, front, settings, plain))
    if plan.path is not None:
        evidence = shown.evidence(found, ranked, front, settings, command, plain)
        head = shown.head(ranked[0], settings.objectives, plan.path)
        write_whole(plan.path, stack_file.text(ranked[0].words, head, evidence, plan.asked).encode())
        show(f"{plan.path} is written; to run it: {stack_file.usage(plan.path)}")
    for tried in outcomes.POINTS:
        tried["exit_code"] = Outcome.OK.exit_code  # a stack that failed is no candidate; the search itself succeeded


def show(text: str) -> None:
    console().print(text, markup=False, end="\n\n")
