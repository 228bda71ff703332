"""What the report says of a study on one machine, before it is Markdown or HTML: both show the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

from pi0exp import compose
from pi0exp.experiments.tables.points import machine_line
from pi0exp.report import published
from pi0exp.report.answers import answer
from pi0exp.report.cells import ABSENT, Column, cases, columns
from pi0exp.report.plots import Plot, plots
from pi0exp.report.published import Figure, Judged
from pi0exp.report.rows import OPTIONS, PLAIN, Facet, Row, cards, facets, missing
from pi0exp.report.sources import Measured
from pi0exp.report.study import Study
from pi0exp.result import measured_at
from pi0exp.track import Record

MOST_NAMED = 6
"""Points that are missing, by name."""


@dataclass(frozen=True)
class Table:
    """caption: what its rows have in common. titles, numbers: of the columns; numbers stand to the right."""

    caption: str
    columns: tuple[Column, ...]

    @property
    def rows(self) -> list[list[str]]:
        return [list(cells) for cells in zip(*(column.cells for column in self.columns), strict=True)]


@dataclass(frozen=True)
class Machine:
    """A study on one GPU. slug: its folder. about: GPU, versions, days, commits. when: `measured_at` of the last.

    lacks: so many points of the study were not measured there. words: with which the study's commands measure them as
    they were.
    """

    slug: str
    gpu: str
    about: str
    when: str
    lacks: int
    words: tuple[str, ...]
    answer: str
    facets: tuple[Facet, ...]
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]

    @property
    def date(self) -> str:
        """The day."""
        return self.when[:10]

    @property
    def rows(self) -> list[Row]:
        return [row for facet in self.facets for row in facet.rows]

    @property
    def has_gpu(self) -> bool:
        return any(row.record["fingerprint"].get("vendor", "cpu") != "cpu" for row in self.rows)

    @property
    def other_models(self) -> bool:
        """Whether a model was asked for that the study does not name."""
        return any(word.startswith("model=") for word in self.words)


@dataclass(frozen=True)
class Chapter:
    """A study with all machines on which it ran, none where it was not measured yet."""

    study: Study
    machines: tuple[Machine, ...]
    figures: tuple[Judged, ...]

    @property
    def last(self) -> Machine | None:
        """The machine that speaks for the study: rather of Pi0 than of a smaller model, rather with a GPU than without,
        with the fewest points lacking; of several the one that measured last, and then the first.
        """
        return max(
            self.machines, key=lambda one: (not one.other_models, one.has_gpu, -one.lacks, one.when), default=None
        )

    @property
    def answer(self) -> str:
        """Of the machine that speaks for the study."""
        return "" if self.last is None else self.last.answer

    def commands(self, machine: Machine) -> tuple[str, ...]:
        """How to measure it again as that machine did."""
        named = f"study={self.study.name} "
        return tuple(" ".join([one, *machine.words]) if named in one else one for one in self.study.commands)

    @property
    def again(self) -> tuple[str, ...]:
        """The commands of all machines, each once."""
        return tuple(dict.fromkeys(one for machine in self.machines for one in self.commands(machine)))


def chapter(study: Study, measured: Measured, figures: Sequence[Figure]) -> Chapter:
    machines = tuple(machine(study, slug, found) for slug, found in sorted(measured.get(study.name, {}).items()))
    rows = {one.gpu: one.rows for one in machines}
    own = [figure for figure in figures if figure.study == study.name]
    texts = {figure.id: figure.text for figure in figures}
    found = (
        replace(published.judged(figure, rows), others=tuple(texts[name] for name in figure.conflicts))
        for figure in own
    )
    return Chapter(study, machines, tuple(found))


def machine(study: Study, slug: str, records: Sequence[Record]) -> Machine:
    found = facets(study, records)
    kept = [row.record for facet in found for row in facet.rows]
    prints = [record["fingerprint"] for record in kept]
    absent = missing(study, kept)
    calls = sorted({row.calls for facet in found for row in facet.rows} - {0})
    about = f"{machine_line(prints)}; {_some(calls)} calls a point, one process each."
    return Machine(
        slug=slug,
        gpu=str(prints[0].get("gpu", slug)),
        about=about,
        when=max(map(measured_at, kept)),
        lacks=len(absent),
        words=tuple(asked_for(study, found)),
        answer=" ".join(filter(None, [answer(study.report, found), incomplete(absent, study)])),
        facets=tuple(found),
        tables=(*(table(study, facet, cards(found)) for facet in found), *parts(found)),
        plots=tuple(plots(study.report, found)),
    )


def asked_for(study: Study, found: Sequence[Facet]) -> list[str]:
    """The words that a study does not say and that all its rows had: another model, and measure=quick."""
    rows = [row for facet in found for row in facet.rows if row.ok]
    plain = compose.defaults()["model"]
    models = {str(row.record["params"].get("model", plain)) for row in rows}
    free = not any("model" in words for words in study.planned)
    named = [f"model={model}" for model in models if free and len(models) == 1 and model != plain]
    return named + ["measure=quick"] * bool(rows and all(row.quick for row in rows))


def incomplete(points: Sequence[str], study: Study) -> str:
    """What of the study was not measured there; "" for nothing."""
    if not points:
        return ""
    named = ", ".join(f"`{point}`" for point in points[:MOST_NAMED])
    more = f" and {len(points) - MOST_NAMED} more" if len(points) > MOST_NAMED else ""
    return f"Not measured: {len(points)} of {len(study.planned)} points ({named}{more})."


def _some(calls: list[int]) -> str:
    if not calls:
        return "no"
    return " or ".join(map(str, calls)) if len(calls) < 4 else f"{calls[0]} to {calls[-1]}"


def table(study: Study, facet: Facet, gpus: Sequence[str] = ()) -> Table:
    """gpus: of all facets; of several a column says which one a row was measured on."""
    names = [name for name in study.report.label if name not in study.report.facet] or [OPTIONS]
    labels = [Column(name, [_code(row.names[i]) for row in facet.rows], number=False) for i, name in enumerate(names)]
    if len(gpus) > 1:
        letters = {gpu: ascii_uppercase[i] if i < len(ascii_uppercase) else str(i + 1) for i, gpu in enumerate(gpus)}
        labels.append(Column("GPU", [letters.get(row.card, ABSENT) for row in facet.rows], number=False))
    return Table(facet.title, (*labels, *columns(facet, study.report.metrics)))


def parts(found: Sequence[Facet]) -> list[Table]:
    """A table for each row that was measured part by part."""
    rows = [(facet, row) for facet in found for row in facet.rows]
    made = [(facet, row, cases(row)) for facet, row in rows]
    return [
        Table(" · ".join(filter(None, [facet.title if len(found) > 1 else "", row.label, "part by part"])), tuple(own))
        for facet, row, own in made
        if own
    ]


def _code(text: str) -> str:
    return text if text in (PLAIN, "-") else f"`{text}`"


def figures_table(found: Sequence[Judged]) -> Table:
    """Published figures beside ours."""
    cells = [
        (
            one.figure.what,
            one.figure.text,
            one.figure.gpu + (" (assumed)" if one.figure.assumed else ""),
            one.ours_text,
            one.gpu,
            one.told + (f"; otherwise published: {', '.join(one.others)}" if one.others else ""),
            one.figure.source,
        )
        for one in found
    ]
    titles = [("what", False), ("published", True), ("on", False), ("ours", True), ("on ", False)]
    titles += [("verdict", False), ("source", False)]
    return Table("", tuple(Column(t, [row[i] for row in cells], n) for i, (t, n) in enumerate(titles)))
