"""Much of tests' time is Hydra's, composing from files that do not change meanwhile, and MLflow's, making tables. This
keeps both. A command that a test starts composes as it does for every user.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from stores import copied

from pi0exp import backend, compose, plugins

SESSIONS: dict[tuple[str, tuple[plugins.Plugin, ...]], Any] = {}
"""(folder, plugins) -> what Hydra holds during a session."""
FILES: dict[tuple[str, int], Any] = {}
"""(file, time of its last change) -> what stands in it."""
CONFIGURATIONS: dict[tuple[tuple[str, ...], tuple[plugins.Plugin, ...]], dict[str, Any]] = {}
"""(words, plugins) -> what they compose to."""
COMPOSED: dict[tuple[Any, ...], DictConfig] = {}
"""What Hydra is asked for, and all that its answer depends on -> its answer."""


@contextmanager
def kept_session(config_dir: str, **given: Any) -> Iterator[None]:
    """`initialize_config_dir`, which goes on with the first session of its kind."""
    key = (config_dir, plugins.installed())
    if key not in SESSIONS:
        with initialize_config_dir(config_dir, **given):
            SESSIONS[key] = GlobalHydra.instance().hydra
    state = GlobalHydra.instance()
    before, state.hydra = state.hydra, SESSIONS[key]
    try:
        yield
    finally:
        state.hydra = before


def kept_file(file: Any, load: Any = OmegaConf.load) -> Any:
    """`OmegaConf.load`; a third of what composing takes is PyYAML reading the same twenty files."""
    name = str(file if isinstance(file, str | os.PathLike) else file.name)
    key = (name, os.stat(name).st_mtime_ns)
    if key not in FILES:
        FILES[key] = load(file)
    return deepcopy(FILES[key])


def kept_words(words: Sequence[str], compose_anew: Any = compose.from_words) -> dict[str, Any]:
    """`compose.from_words`."""
    key = (tuple(words), plugins.installed())
    if key not in CONFIGURATIONS:
        CONFIGURATIONS[key] = compose_anew(words)
    return deepcopy(CONFIGURATIONS[key])


def kept_configuration(
    loader: ConfigLoaderImpl,
    config_name: str | None,
    overrides: list[str],
    run_mode: Any,
    from_shell: bool = True,
    validate_sweep_overrides: bool = True,
    compose_anew: Any = ConfigLoaderImpl.load_configuration,
) -> DictConfig:
    """`ConfigLoaderImpl.load_configuration`; anew where files of a test's own take part."""
    asked = (config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
    sources = tuple(str(source.path) for source in loader.config_search_path.get_path())
    folders = {source.removeprefix("file://") for source in sources if source.startswith(("/", "file://"))}
    if folders != {str(compose.CONF)} or any("searchpath" in word for word in overrides):
        return compose_anew(loader, *asked)
    key = (config_name, tuple(overrides), *asked[2:], sources, plugins.installed(), os.getcwd())
    if key not in COMPOSED:
        COMPOSED[key] = compose_anew(loader, *asked)
    return deepcopy(COMPOSED[key])


def keep_files_and_tables() -> None:
    """Whatever composes, and whoever opens a store."""
    OmegaConf.load = staticmethod(kept_file)
    backend._create = copied


def keep_configurations() -> None:
    """For a script that runs whole commands which compose the same, or whose forks do."""
    ConfigLoaderImpl.load_configuration = kept_configuration


def keep_all() -> None:
    keep_files_and_tables()
    compose.initialize_config_dir = kept_session
    compose.from_words = kept_words
