"""Tables of what can be chosen: conf/, the classes that it names, and what those need of a machine."""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pi0exp import build, compose, config
from pi0exp.card import word
from pi0exp.experiments.tables.points import leaves, markdown
from pi0exp.machine import Machine
from pi0exp.option import STAGES

INPUTS = ("subject", "model", "workload", "measure", "study")
MACHINES = {
    "CPU": Machine(),
    "NVIDIA": Machine(gpu="NVIDIA", vendor="nvidia", arch="sm_90"),
    "AMD": Machine(gpu="AMD", vendor="amd", arch="gfx1100"),
    "Instinct": Machine(gpu="AMD", vendor="amd", arch="gfx950"),
}
"""One of each kind that options tell apart."""
NEEDS = {
    ("CPU", "NVIDIA", "AMD", "Instinct"): "-",
    ("NVIDIA", "AMD", "Instinct"): "a GPU",
    ("NVIDIA",): "an NVIDIA GPU",
    ("AMD", "Instinct"): "an AMD GPU",
    ("Instinct",): "AMD MI300 or MI350",
}


def options() -> str:
    """A row an option of the stack's groups, in the order of application, each group's plain option first."""
    rows, plain = [], compose.defaults()
    with compose.session():
        for group in config.GROUPS:
            files = _own(group)
            nodes = {name: compose.option_node(group, name) for name in files}
            targets = [node["_target_"] for node in nodes.values()]
            for name, node in sorted(nodes.items(), key=lambda item: (item[0] != plain[group], item[0])):
                option = config.option(group, node)
                settings = [f"`{key}`" for key in node if key not in ("_target_", *STAGES)]
                needs = needed([option.unmet(machine) for machine in MACHINES.values()])
                what = _what(files[name], node["_target_"], targets)
                rows.append([f"`{group}={name}`", what, ", ".join(settings) or "-", option.numerics.name, needs])
    return markdown(("option", "what it is", "settings", "numerics", "needs"), (), rows)


def stacks() -> str:
    """A row a named stack."""
    rows = []
    for name, file in _own("stack").items():
        stack = config.stack(compose.from_words([f"stack={name}"]))
        needs = needed([build.unmet(stack, machine) for machine in MACHINES.values()])
        rows.append([f"`{name}`", comment(file), _sets(file), build.numerics(stack).name, needs])
    return markdown(("stack", "what it is", "sets", "numerics", "needs"), (), rows)


def _sets(file: Path) -> str:
    """The stack that it builds on, and the words that it adds."""
    body: Any = OmegaConf.to_container(OmegaConf.load(file))
    entries = [entry for entry in body.pop("defaults") if entry != "_self_"]
    below = [entry for entry in entries if isinstance(entry, str)]
    chosen = {
        key.removeprefix("override /"): name for entry in entries if entry not in below for key, name in entry.items()
    }
    words = [word(group, name) for group, name in chosen.items() if below or compose.defaults()[group] != name]
    words += [word(name, value if isinstance(value, str) else json.dumps(value)) for name, value in leaves(body)]
    return f"`{' '.join([*below, *words])}`" if below or words else "nothing"


def inputs() -> str:
    """A row a subject, model, workload, measure and study."""
    rows = [[f"`{group}={name}`", comment(file)] for group in INPUTS for name, file in _own(group).items()]
    return markdown(("choice", "what it is"), (), rows)


def switches() -> str:
    """A row a switch of conf/fusion/none.yaml, by the comment behind it."""
    text, rows, section = _own("fusion")["none"].read_text(), [], ""
    for line in text.splitlines():
        if match := re.fullmatch(r"(?P<indent> *)(?P<name>\w+): +(?P<value>\w+)? *(# *(?P<what>.*))?", line):
            section = section if match["indent"] else ""
            if match["value"] is None:
                section = f"{match['name']}."
            else:
                rows.append([f"`fusion.{section}{match['name']}`", match["what"]])
    return markdown(("switch", "what it does"), (), rows)


def needed(reasons: list[list[str]]) -> str:
    """In a word what it needs, given why it cannot run on each of MACHINES. What all of them lack are packages."""
    lacking = set.intersection(*map(set, reasons))
    ready = tuple(name for name, why in zip(MACHINES, reasons, strict=True) if not set(why) - lacking)
    return NEEDS[ready]


def comment(file: Path) -> str:
    """The comment at the head of a yaml file; "" without one."""
    head = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    lines = [line.removeprefix("#").strip() for line in head[: next(i for i, x in enumerate(head) if x[:1] != "#")]]
    return " ".join(lines).removesuffix(".")


def _own(group: str) -> dict[str, Path]:
    """Name -> yaml file of the repository's own; those of plugins stand in no README."""
    folders = (compose.CONF, compose.PACKAGE / "experiments")
    found = compose.files()[group].items()
    return {name: file for name, file in found if any(file.is_relative_to(folder) for folder in folders)}


def _what(file: Path, target: str, targets: list[str]) -> str:
    """The comment of its yaml; else what its module says first, or its class where the module holds several."""
    if text := comment(file):
        return text
    module, _, name = target.rpartition(".")
    loaded = import_module(module)
    shared = len({one for one in targets if one.rpartition(".")[0] == module}) > 1
    text = inspect.getdoc(getattr(loaded, name) if shared else loaded) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"\.(?= [A-Z]|$)", first)[0]
