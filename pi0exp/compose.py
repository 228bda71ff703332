"""Everything that needs Hydra while composing: where its folders are, and options of single stages."""

import tempfile
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pi0exp.errors import UserError

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf"
STAGED = ("attention", "gemm")
"""Groups whose option may differ between stages."""
_STAGES = ("vision", "prefill", "denoise")


class Studies(SearchPathPlugin):
    """Lets study=NAME find experiments/study/NAME.yaml."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("pi0exp-experiments", f"file://{PACKAGE / 'experiments'}")


def register() -> None:
    """Tell Hydra of our folders and resolvers, before it composes anything."""
    Plugins.instance().register(Studies)
    # Hydra insists on writing a file for each sweep; everything in it is in MLflow too.
    OmegaConf.register_new_resolver(
        "pi0exp_scratch", lambda: str(Path(tempfile.gettempdir(), "pi0exp-sweep")), replace=True
    )


def one_line(error: Exception) -> str:
    """An error of Hydra or OmegaConf on one line, options listed with commas."""
    texts = [str(error)]
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
    )
    kept = [line for line in lines if line and not line.startswith(noise)]
    text = ""
    for line in kept:
        joint = "" if not text else " " if text.endswith(":") or line[0].islower() else "; "
        joint = ", " if " " not in line and text and not text.endswith(":") else joint
        text += joint + line.rstrip(".")
    return text


def choices(hydra_node: Any) -> dict[str, str]:
    """Group -> chosen option, of this project's groups, from the composed node `hydra`."""
    chosen = hydra_node.runtime.choices
    return {str(group): str(name) for group, name in chosen.items() if "/" not in group and name is not None}


def plain(cfg: DictConfig, chosen: dict[str, str]) -> dict[str, Any]:
    """The composed configuration as a dict, stages resolved, the names of the options under `names`."""
    try:
        composed = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(composed, dict)
    result: dict[str, Any] = {str(key): value for key, value in composed.items() if key != "hydra"}
    result["names"] = dict(chosen)
    for group in STAGED:
        for stage in _STAGES:
            if (node := result[group].get(stage)) is not None:
                name, inner = stage_option(group, stage, node)
                result[group][stage], result["names"][f"{group}.{stage}"] = inner, name
    return result


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
    if nested := [key for key in settings if key in _STAGES]:
        raise UserError(f"{where}.{nested[0]}: an option of a single stage has no stages of its own")
    try:
        composed = OmegaConf.to_container(compose(config_name=f"{group}/{name}")[group], resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    assert isinstance(composed, dict)
    inner = {str(key): value for key, value in composed.items() if key not in _STAGES}
    if unknown := [key for key in settings if key not in inner]:
        allowed = ", ".join(key for key in inner if key != "_target_") or "none"
        raise UserError(f"{where}.{unknown[0]}: {group}={name} has no such setting; it has: {allowed}")
    return name, inner | settings
