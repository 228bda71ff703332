"""The report as Markdown: a file a study and machine, whose every word follows from the results that lie beside it."""

from collections.abc import Sequence

from pi0exp.experiments.tables.points import NONE_YET, grid
from pi0exp.report.document import Chapter, Machine, Table, figures_table

OF_STORE = "From the local store and the result files of the repository."
SPEED_UP = "`speed-up`: how many times as fast as the row with 1. `95 %`: confidence interval of the median."


def page(chapter: Chapter, machine: Machine, source: str | None = None) -> str:
    """The content of `experiments/results/<study>/<gpu>.md`. source: where it is from, if not from there."""
    parts = [f"# {chapter.study.name}: {machine.gpu}", chapter.study.question, machine.answer, machine.about]
    if any(column.title == "speed-up" for one in machine.tables for column in one.columns):
        parts.append(SPEED_UP)
    for one in machine.tables:
        parts += [f"## {one.caption}" if one.caption and len(machine.tables) > 1 else one.caption, table(one)]
    if chapter.figures:
        parts += ["## Published", table(figures_table(chapter.figures))]
    if commands := chapter.commands(machine):
        parts += ["## Again", "```\n" + "\n".join(commands) + "\n```"]
    parts.append(source or f"From the results in `{machine.slug}/`, by `python -m pi0exp.report --write`.")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def printed(chapters: Sequence[Chapter]) -> str:
    """All pages one after the other, and what was not measured."""
    parts = []
    for chapter in chapters:
        parts += [page(chapter, machine, OF_STORE) for machine in chapter.machines]
        if not chapter.machines:
            parts.append(f"# {chapter.study.name}\n\n{chapter.study.question}\n\n{NONE_YET}")
    return "\n".join(parts)


def table(one: Table) -> str:
    return grid([(column.title.strip(), column.number) for column in one.columns], one.rows)
