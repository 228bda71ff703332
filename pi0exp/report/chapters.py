"""Which studies the report has, in which order."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pi0exp import compose
from pi0exp.errors import UserError
from pi0exp.known import RESULTS
from pi0exp.report import published
from pi0exp.report.document import Chapter, chapter
from pi0exp.report.sources import Measured
from pi0exp.report.study import ABOUT, study

ADHOC = "adhoc"
"""What nobody gave a name. Only shown where it is asked for: it answers no question."""


def chapters(
    names: Sequence[str], read: Callable[[Iterable[str] | None], Measured], results: Path = RESULTS
) -> list[Chapter]:
    """These studies; without names all, in the order of the published figures, then of the alphabet. Every figure is
    in some chapter, whether there is such a study or not.

    read: the records of the studies with these names, of all for None. Raises UserError for a name that is no study.
    """
    figures = published.figures()
    known = {*compose.files()["study"], *(path.parent.name for path in results.glob(f"*/{ABOUT}"))}
    measured = read(names or None)
    if unknown := [name for name in names if name not in known and name not in measured]:
        raise UserError(f"{unknown[0]}: no such study, and none of the store; there are {', '.join(sorted(known))}")
    order = list(dict.fromkeys(figure.study for figure in figures))
    every = sorted(
        {*known, *measured, *order} - {ADHOC},
        key=lambda name: (order.index(name) if name in order else len(order), name),
    )
    return [chapter(study(name, results), measured, figures) for name in dict.fromkeys(names or every)]
