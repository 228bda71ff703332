"""The index of all studies, and the picture of one: what `python -m pi0exp.report` says of the committed results."""

from functools import cache

from pi0exp.experiments.tables.points import NONE_YET, markdown
from pi0exp.report.chapters import chapters
from pi0exp.report.document import Chapter
from pi0exp.report.sources import committed


def answers(name: str) -> str:
    """A row a study: its question, its last answer, the day, and where its tables are."""
    rows = []
    for chapter in (one for one in _chapters() if one.study.question or one.machines):
        links = [f"[{one.gpu}](results/{chapter.study.name}/{one.slug}.md)" for one in chapter.machines]
        date = "-" if chapter.last is None else chapter.last.date
        answer = chapter.answer or NONE_YET.strip()
        rows.append([f"`{chapter.study.name}`", chapter.study.question or "-", answer, date, ", ".join(links) or "-"])
    return markdown(("study", "question", "last answer", "date", "tables"), (), rows)


def plot(name: str) -> str:
    """The picture of a study for the README, whose folder `docs/` is in; and its answer."""
    chapter = _measured().get(name)
    if chapter is None:
        return NONE_YET
    return f"![{chapter.study.question}](docs/{name}.svg)\n\n{_told(chapter)}\n"


def findings(names: str) -> str:
    """What came out of some studies, `a,b,c`, for the README: a point each, with a link to its tables."""
    there = _measured()
    lines = [f"* **{there[name].study.question}** {_told(there[name])}" for name in names.split(",") if name in there]
    return "\n".join(lines) + "\n" if lines else NONE_YET


def _told(chapter: Chapter) -> str:
    """The answer, of which machine it is, and where all of it stands."""
    last = chapter.last
    assert last is not None
    link = f"[All of it](experiments/results/{chapter.study.name}/{last.slug}.md)"
    return f"{last.answer} {last.about} {link}."


def _measured() -> dict[str, Chapter]:
    return {one.study.name: one for one in _chapters() if one.machines}


@cache
def _chapters() -> list[Chapter]:
    return chapters([], committed)
