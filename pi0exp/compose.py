"""Everything that needs Hydra while composing: where its folders are, and options of single stages."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pi0exp import folders, plugins
from pi0exp.errors import UserError
from pi0exp.option import STAGES
from pi0exp.root import default_root

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf"
OWN = ("name", "resume", "subject", "track", "report", "search")
"""Keys of `conf/config.yaml` and of `study=search` itself; every other one comes from a group."""
STAGED = ("gemm", "attention", "compile_mode")
"""Groups whose option may differ between stages."""


def register() -> None:
    """Tell Hydra of our folders and resolvers, before it composes anything. Raises UserError for a bad plugin."""
    files()
    known = Plugins.instance()
    known.register(folders.Studies)
    known.register(folders.Folders)
    # Not above: it imports this file, and Hydra replaces its own classes when it looks for plugins.
    from pi0exp import sweeper

    sweeper.register(known)


def scratch(launcher: str) -> str:
    """The folder of Hydra's sweeps, for which it insists on a file each; everything in it is in MLflow too.

    launcher: its class. Where it may start points on other hosts its files must be where they can see them: beside the
    local store. Jobs of submitit leave their output there.
    """
    if launcher.endswith((".BasicLauncher", ".LocalLauncher", ".RayLauncher")):
        return str(Path(tempfile.gettempdir(), f"pi0exp-sweep-{os.getuid()}"))
    return str(default_root() / ".sweep")


# Here, since the processes that launchers start only unpickle the command's function, which imports this file.
OmegaConf.register_new_resolver("pi0exp_scratch", scratch, replace=True)


@contextmanager
def session() -> Iterator[None]:
    """Within it Hydra composes from our folders, or as the command does that is running. Raises UserError for whatever
    Hydra refuses.
    """
    register()
    running = GlobalHydra.instance().is_initialized()
    try:
        with nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3", job_name="pi0exp"):
            yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error


def files() -> dict[str, dict[str, Path]]:
    """Group -> name -> its yaml file, studies included, plugins' options after ours.

    Raises UserError where a plugin brings a group that is not there, or a name that is taken: Hydra would take one of
    the two in silence.
    """
    places = {folder.name: folder for folder in sorted(CONF.iterdir()) if folder.is_dir() and folder.name != "hydra"}
    places["study"] = folders.EXPERIMENTS / "study"
    found = {group: {file.stem: file for file in sorted(place.glob("*.yaml"))} for group, place in places.items()}
    for plugin in plugins.installed():
        for group, name, file in plugin.files():
            if group not in found:
                raise UserError(f"{plugin} brings {group}/{name}.yaml; there is no group {group}: {', '.join(found)}")
            if name in found[group]:
                raise UserError(f"{plugin} brings {group}/{name}.yaml, which {found[group][name]} is already")
            found[group][name] = file
    return found


def one_line(error: Exception) -> str:
    """An error of Hydra or OmegaConf on one line, options listed with commas."""
    texts = [str(error)]
    if isinstance(error, OverrideParseException):
        texts.insert(0, f"{error.override!r} is not of the form key=value:")
    if error.__cause__ is not None and str(error.__cause__) not in texts[0]:
        texts.append(str(error.__cause__))
    lines = [line.strip() for text in texts for line in text.splitlines()]
    noise = (
        "full_key:",
        "object_type=",
        "reference_type=",
        "See https://",
        "Set the environment variable",
        "Config search path:",
        "provider=",
        "To append to your config use",
    )
    kept = [line for line in lines if line and not line.startswith(noise)]
    text = ""
    for line in kept:
        joint = "" if not text else " " if text.endswith(":") or line[0].islower() else "; "
        joint = ", " if " " not in line and text and not text.endswith(":") else joint
        text += joint + line.rstrip(".")
    return text


def choices(hydra_node: Any) -> dict[str, str]:
    """Group -> chosen option, of this project's groups in their order, from the composed node `hydra`."""
    chosen = hydra_node.runtime.choices
    names = {str(group): str(name) for group, name in chosen.items() if "/" not in group and name is not None}
    ordered = [*(group for group in defaults() if group in names), *names]
    return {group: names[group] for group in ordered}


def defaults() -> dict[str, str]:
    """Group -> the option that `conf/config.yaml` chooses."""
    entries = [entry for entry in _defaults_list(CONF / "config.yaml") if isinstance(entry, dict)]
    pairs = [(str(group), name) for entry in entries for group, name in entry.items()]
    return {group: str(name) for group, name in pairs if "/" not in group and name is not None}


def _defaults_list(path: Path) -> list[Any]:
    node = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(node, dict)
    return list(node.get("defaults", []))


def overridden(hydra_node: Any) -> dict[str, str]:
    """What the command line and the sweep set, key -> value, of the composed node `hydra`."""
    pairs = (str(override).partition("=") for override in hydra_node.overrides.task)
    return {key.lstrip("+~"): value for key, _, value in pairs}


def plain(cfg: DictConfig, chosen: dict[str, str]) -> dict[str, Any]:
    """The composed configuration as a dict, stages resolved.

    `names` has the names of the options, `changed` the settings in which they differ from their files, by dotted keys:
    {"fusion.rewrites.batch_cameras": "true"}. A named stack changes settings just as the command line does.
    """
    try:
        composed = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(composed, dict)
    result: dict[str, Any] = {str(key): value for key, value in composed.items() if key != "hydra"}
    if unknown := [key for key in result if key not in (*OWN, *chosen)]:
        raise UserError(f"{unknown[0]}: no such setting; there are {', '.join([*OWN, *sorted(chosen)])}")
    result["names"], result["changed"] = dict(chosen), {}
    nodes = {group: node for group, node in result.items() if group in chosen and isinstance(node, dict)}
    options = {group: node for group, node in nodes.items() if "_target_" in node}
    files = as_in_files(cfg, {group: chosen[group] for group in options})
    for group, node in options.items():
        stages = [stage for stage in STAGES if group in STAGED and node.get(stage) is not None]
        own, file = ({key: value for key, value in one.items() if key not in stages} for one in (node, files[group]))
        result["changed"] |= differences(own, file, f"{group}.")
        for stage in stages:
            inner_name, inner = stage_option(group, stage, node[stage])
            node[stage], result["names"][f"{group}.{stage}"] = inner, inner_name
            result["changed"] |= differences(inner, option_node(group, inner_name), f"{group}.{stage}.")
    return result


_FILES: WeakKeyDictionary[Any, dict[tuple[tuple[str, str], ...], DictConfig]] = WeakKeyDictionary()
"""Hydra's loader, of which each session has one -> options -> what it composed of their files."""
_NODES: WeakKeyDictionary[Any, dict[tuple[str, str], dict[str, Any]]] = WeakKeyDictionary()
"""The same for single options: group and name -> the composed node."""


def as_in_files(cfg: DictConfig, options: dict[str, str]) -> dict[str, Any]:
    """The composed configuration with each of these options, group -> name, as its file has it; stages unresolved."""
    # Composing takes a quarter of a second, and most points of a sweep share their options.
    loader, key = GlobalHydra.instance().config_loader(), tuple(options.items())
    known = _FILES.setdefault(loader, {})
    if key not in known:
        known[key] = compose("config", overrides=[f"{group}={name}" for group, name in options.items()])
    files, copied = known[key], deepcopy(cfg)
    for group in options:
        copied[group] = files[group]  # there what it takes over from other groups is as in `cfg`
    composed = OmegaConf.to_container(copied, resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def differences(node: dict[str, Any], file: dict[str, Any], prefix: str) -> dict[str, str]:
    """Dotted key -> value, as one writes it on the command line, of what stands in `node` otherwise than in `file`.

    What only `file` has and is not null is "removed".
    """
    changed: dict[str, str] = {}
    for key in dict.fromkeys([*node, *file]):
        mine, theirs = node.get(key), file.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            changed |= differences(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            text = mine if isinstance(mine, str) else json.dumps(mine)
            changed[f"{prefix}{key}"] = text if key in node else "removed"
    return changed


def from_words(words: Sequence[str]) -> dict[str, Any]:
    """What these words of the command line compose to, for whoever has no command line. Raises UserError."""
    with session():
        try:
            composed = compose("config", overrides=list(words), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            from pi0exp import advice  # it composes

            raise UserError(advice.on(error, words)) from error
        ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        return plain(ours, choices(composed.hydra))


def value_of(text: str) -> Any:
    """What stands behind the = of a word, as YAML reads it: "[true,false]" is a list of two."""
    read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(read, dict)
    return read["value"]


def at(node: Any, name: str) -> Any:
    """What stands in a composed dict under a dotted key. Raises KeyError."""
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            raise KeyError(name)
        node = node[part]
    return node


def option_node(group: str, name: str) -> dict[str, Any]:
    """The composed node of one option as its file has it, within Hydra's own run or a `session`."""
    known = _NODES.setdefault(GlobalHydra.instance().config_loader(), {})
    if (group, name) not in known:
        composed = OmegaConf.to_container(compose(config_name=f"{group}/{name}")[group], resolve=True)
        assert isinstance(composed, dict)
        known[group, name] = {str(key): value for key, value in composed.items()}
    return deepcopy(known[group, name])


def stage_option(group: str, stage: str, node: Any) -> tuple[str, dict[str, Any]]:
    """The name and the composed node of `attention.denoise=sdpa` or `attention.denoise='{name: sdpa, ...}'`.

    Looked up where Hydra finds the group's own options. Raises UserError that lists the right names.
    """
    where = f"{group}.{stage}"
    settings = dict(node) if isinstance(node, dict) else {"name": node}
    name = settings.pop("name", None)
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"{where} is {node!r}; it must name one of {', '.join(known)}, or be {{name: ..., setting: ...}}"
        )
    if nested := [key for key in settings if key in STAGES]:
        raise UserError(f"{where}.{nested[0]}: an option of a single stage has no stages of its own")
    try:
        composed = option_node(group, name)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    inner = {key: value for key, value in composed.items() if key not in STAGES}
    if unknown := [key for key in settings if key not in inner]:
        allowed = ", ".join(key for key in inner if key != "_target_") or "none"
        raise UserError(f"{where}.{unknown[0]}: {group}={name} has no such setting; it has: {allowed}")
    return name, inner | settings
