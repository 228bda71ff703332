"""The report as one HTML page that needs nothing else: style, text and pictures are in it, and no script."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pi0exp.report.document import Chapter, figures_table
from pi0exp.report.published import Judged, State
from pi0exp.report.svg import DARK, FAMILY, HUES, LIGHT, NARROW, WIDE

STATES = {
    State.reproduced: "good",
    State.differs: "bad",
    State.not_run: "open",
    State.not_measured: "open",
    State.unclear: "bad",
}
"""What a verdict looks like; the words are there as well."""


@dataclass(frozen=True)
class Line:
    """A study in the summary. verdicts: how many published figures came out how."""

    chapter: Chapter
    date: str
    verdicts: list[tuple[str, str]]


def page(chapters: Sequence[Chapter]) -> str:
    """The whole page. What was not measured is a line of the summary, and no empty section."""
    environment = Environment(
        loader=PackageLoader("pi0exp.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["code"] = code
    measured = [one for one in chapters if one.machines]
    judged = [figure for one in chapters for figure in one.figures]
    machines = [machine for one in measured for machine in one.machines]
    return environment.get_template("page.html.j2").render(
        lines=[line(one) for one in measured],
        missing=[one for one in chapters if not one.machines],
        chapters=measured,
        figures=figures_table,
        counts=[(STATES[state], f"{count} {state}") for state, count in tally(judged)],
        judged=judged,
        gpus=sorted({machine.gpu for machine in machines}),
        days=sorted({machine.date for machine in machines}),
        points=sum(len(machine.rows) for machine in machines),
        variables={"hues": HUES, "light": LIGHT, "dark": DARK, "family": FAMILY},
        widths=(WIDE, NARROW),
        states=STATES,
    )


def line(chapter: Chapter) -> Line:
    verdicts = [(STATES[state], f"{count} {state}") for state, count in tally(chapter.figures)]
    return Line(chapter, max(machine.date for machine in chapter.machines), verdicts)


def tally(found: Sequence[Judged]) -> list[tuple[State, int]]:
    counts = Counter(one.state for one in found)
    return [(state, counts[state]) for state in State if counts[state]]


def code(text: str) -> Markup:
    """Text in which `this` is code."""
    parts = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )
