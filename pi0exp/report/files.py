"""What the report writes: the tables beside the results, the picture of the README, a page."""

import os
from collections.abc import Sequence
from pathlib import Path

from pi0exp import compose
from pi0exp.errors import UserError
from pi0exp.known import RESULTS
from pi0exp.report import text
from pi0exp.report.document import Chapter, Machine
from pi0exp.report.plots import Plot
from pi0exp.report.svg import WIDE, Canvas

DOCS = compose.PACKAGE.parent / "docs"
PICTURES = {"ladder": "waterfall"}
"""Study -> the plot of it that stands in the README as docs/STUDY.svg."""


def write(chapters: Sequence[Chapter], results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Tables and pictures of committed results; which files they are. Raises UserError where one cannot be written."""
    return [put(path, content) for path, content in written(chapters, results, docs).items()]


def written(chapters: Sequence[Chapter], results: Path = RESULTS, docs: Path = DOCS) -> dict[Path, str]:
    """File -> content."""
    found = {
        results / chapter.study.name / f"{machine.slug}.md": text.page(chapter, machine)
        for chapter in chapters
        for machine in chapter.machines
    }
    for chapter in chapters:
        if (content := picture(chapter)) is not None:
            found[docs / f"{chapter.study.name}.svg"] = content
    return found


def picture(chapter: Chapter) -> str | None:
    """All facets of one plot, of the machine that speaks for the study, below each other; None where there is none."""
    if chapter.study.name not in PICTURES or (last := chapter.last) is None:
        return None
    return stacked(last, pictures(chapter, last))


def pictures(chapter: Chapter, machine: Machine) -> list[Plot]:
    from pi0exp.report.plots import PLOTS

    made = PLOTS[PICTURES[chapter.study.name]](chapter.study.report, machine.facets)
    return [plot for plot in made if plot.draw is not None]


def stacked(machine: Machine, plots: Sequence[Plot]) -> str | None:
    """Several plots as one picture that stands alone."""
    if not plots:
        return None
    whole = Canvas(WIDE)
    for plot in plots:
        part = Canvas(WIDE)
        assert plot.draw is not None
        plot.draw(part)
        whole.text(8, whole.height + 24, f"{plot.title} · {machine.gpu}", 15, bold=True)
        whole.parts.append(f'<g transform="translate(0 {whole.height + 34:.0f})">{"".join(part.parts)}</g>')
        whole.height += 34 + part.height
    return whole.svg(f"{plots[0].title}, {machine.gpu}", alone=True) + "\n"


def put(path: Path, content: str) -> Path:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return path
