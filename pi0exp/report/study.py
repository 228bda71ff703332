"""A study as the report knows it: its question, how to ask it again, the order of its points, how they are shown.

A study is a yaml of `experiments/study/`; its question is the comment at its head. Points that were run by hand under
a name have `experiments/results/NAME/about.yml` instead: question, commands, report. A name that has neither has no
question, and is shown all the same.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pi0exp import compose, config, sweep
from pi0exp.config import ReportConfig
from pi0exp.errors import UserError
from pi0exp.known import RESULTS
from pi0exp.report.plots import PLOTS

ABOUT = "about.yml"


@dataclass(frozen=True)
class Study:
    """question: ends with `?`; "" where nobody asked one. commands: how to measure it.

    planned: the points of its sweep in their order, each by the words of the command line: {"stack": "0_eager"}.
    """

    name: str
    question: str = ""
    commands: tuple[str, ...] = ()
    report: ReportConfig = field(default_factory=ReportConfig)
    planned: tuple[dict[str, str], ...] = ()

    @cached_property
    def _unswept(self) -> dict[str, Any]:
        """What the study composes to where nothing is swept; nothing for one that has no yaml."""
        return compose.from_words([f"study={self.name}"]) if self.name in compose.files()["study"] else {}

    @property
    def stack(self) -> str | None:
        """The named stack that the study has without a word that says it."""
        name = self._unswept.get("names", {}).get("stack")
        return None if name is None else str(name)

    def has(self, name: str, value: str) -> bool:
        """Whether `name=value` is so in the study without a word that says it."""
        with suppress(KeyError):
            node = self._unswept if "." in name else self._unswept.get("names")
            return bool(compose.at(node, name) == compose.value_of(value))
        return False


@dataclass(frozen=True)
class About:
    """The form of about.yml."""

    question: str
    commands: list[str]
    report: dict[str, Any] = field(default_factory=dict)


def study(name: str, results: Path = RESULTS) -> Study:
    """Raises UserError, with the file, for one that cannot be read."""
    if file := compose.files()["study"].get(name):
        return of_yaml(name, file)
    about = results / name / ABOUT
    if not about.is_file():
        return Study(name)
    found = config.typed(About, _read(about), f"{about.parent.name}/{ABOUT}")
    return Study(name, found.question, tuple(found.commands), checked(found.report, str(about)))


def of_yaml(name: str, file: Path) -> Study:
    body = _read(file)
    sweeper = (body.get("hydra") or {}).get("sweeper") or {}
    command = f"python -m pi0exp study={name} track.results=experiments/results"
    return Study(name, question(file), (command,), checked(body.get("report") or {}, str(file)), planned(sweeper))


def planned(sweeper: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The points of a sweep, each as key -> value; see `pi0exp.sweep`."""
    with compose.session():
        points = sweep.expanded(sweeper.get("params") or {}, sweeper.get("points") or [], [])
    return tuple({key: value for key, _, value in (word.partition("=") for word in words)} for words in points)


def question(file: Path) -> str:
    """The comment at the head of a study, up to its first question mark."""
    lines = (line.strip() for line in file.read_text().splitlines())
    text = ""
    for line in (line for line in lines if not line.startswith("# @package")):
        if not line.startswith("#"):
            break
        text = f"{text} {line.removeprefix('#').strip()}".strip()
    head, mark, _ = text.partition("?")
    return head + mark if mark else ""


def checked(section: Any, file: str) -> ReportConfig:
    """The section `report` with plots that are known. Raises UserError."""
    try:
        found = config.report({"report": section})
        if wrong := [name for name in found.plots if name not in PLOTS]:
            raise UserError(f"report.plots: {wrong[0]!r} is none of {', '.join(PLOTS)}")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        body = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of the YAML parser, whose errors have no common base but this
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict):
        raise UserError(f"{file}: holds no settings")
    return {str(key): value for key, value in body.items()}
