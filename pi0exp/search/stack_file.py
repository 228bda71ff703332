"""The file that a search leaves: a named stack whose head says how it was found.

Where (`search.write`): `conf` is `best_<gpu>.yaml` among the named stacks of this package, and only a model at full
size on a GPU goes there; a folder DIR is `DIR/stack/best_<gpu>.yaml`, which `python -m pi0exp --config-dir DIR
stack=best_<gpu>` finds; a NAME.yaml is that file. Whether it can be written, and is not the result of another question,
is looked at before the search starts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pi0exp import compose, config
from pi0exp.errors import UserError
from pi0exp.load import gpu_slug, try_folder
from pi0exp.machine import Machine
from pi0exp.search.settings import CONF

FULL_SIZE = ("pi0", "pi05")
"""Models whose stacks are worth a name in `conf/`."""
_ASKED = "# asked: "
_WIDTH = 118


def target(write: str | None, machine: Machine, plain: dict[str, Any]) -> tuple[Path | None, str]:
    """The file to write, or None and why nothing is written."""
    name = f"best_{gpu_slug(machine.gpu)}.yaml"
    if write is None:
        return None, "search.write is null"
    if write != CONF:
        path = Path(write)
        return (path if path.suffix == ".yaml" else path / "stack" / name), ""
    small = not any(config.model(plain)[0] == config.model(compose.from_words([f"model={m}"]))[0] for m in FULL_SIZE)
    why = [text for text, true in (("this is no GPU", not machine.has_gpu), ("this is a reduced model", small)) if true]
    if why:
        return None, f"{' and '.join(why)}, which is no matter for conf/stack; search.write=DIR writes DIR/stack/{name}"
    return compose.CONF / "stack" / name, ""


def check(path: Path, asked: str) -> None:
    """Raises UserError where the result could not be written, or would replace that of another question.

    asked: what is searched, see `asked_of`.
    """
    try:
        try_folder(path.parent)
        standing = path.read_text() if path.exists() else None
    except (UserError, OSError, UnicodeDecodeError) as error:
        text = error if isinstance(error, UserError) else f"{path}: {error}"
        raise UserError(f"{text}; choose another place for the result with search.write") from error
    if standing is not None and f"{_ASKED}{asked}" not in standing.splitlines():
        theirs = next((line for line in standing.splitlines() if line.startswith(_ASKED)), None)
        what = f"answers {theirs.removeprefix(_ASKED)!r}" if theirs else "was not written by a search"
        raise UserError(f"{path} {what}, and this search would replace it; choose another file with search.write")


def asked_of(params: Mapping[str, str], objectives: Sequence[str]) -> str:
    """What a search is of: objectives, model, workload, without the stack, and without the numbers of observations."""
    left_out = (*config.GROUPS, "stack", "measure")
    kept = [f"{name}={value}" for name, value in params.items() if name.split(".")[0] not in left_out]
    return " ".join([f"objectives={','.join(objectives)}", *(word for word in kept if "workload.seed=" not in word)])


def text(words: Sequence[str], head: str, evidence: Sequence[str], asked: str) -> str:
    """The yaml of a stack. words: of the command line, an option for each group or `stack=NAME`. head: one sentence."""
    options = [word.partition("=") for word in words if "." not in word.partition("=")[0]]
    settings = [word.partition("=") for word in words if "." in word.partition("=")[0]]
    lines = ["# @package _global_", *_comment(head), "", *(line for one in evidence for line in _comment(one))]
    lines += [f"{_ASKED}{asked}", "defaults:"]
    lines += [f"  - {name}" if group == "stack" else f"  - override /{group}: {name}" for group, _, name in options]
    lines += ["  - _self_"] if settings else []
    body = OmegaConf.create({})
    for key, _, value in settings:
        OmegaConf.update(body, key, OmegaConf.create(f"value: {value}").value)
    return "\n".join(lines) + "\n" + (f"\n{OmegaConf.to_yaml(body)}" if settings else "")


def _comment(sentence: str) -> list[str]:
    """Wrapped into lines of a comment; words are not broken."""
    lines, line = [], "#"
    for word in sentence.split():
        if len(line) + 1 + len(word) > _WIDTH and line != "#":
            lines.append(line)
            line = "#  "
        line += f" {word}"
    return [*lines, line]


def usage(path: Path) -> str:
    """How to run the stack in this file."""
    if path.parent == compose.CONF / "stack":
        return f"python -m pi0exp stack={path.stem}"
    if path.parent.name == "stack":
        return f"python -m pi0exp --config-dir {path.parent.parent} stack={path.stem}"
    return f"copy it to DIR/stack/, then python -m pi0exp --config-dir DIR stack={path.stem}"
