"""Much of tests' time is Hydra's, composing from files that do not change meanwhile; this process keeps what it can.

What a test starts as a process of its own composes as it does for every user.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from pi0exp import compose, plugins

SESSIONS: dict[tuple[str, tuple[plugins.Plugin, ...]], Any] = {}
"""(folder, plugins) -> what Hydra holds during a session."""
FILES: dict[tuple[str, int], Any] = {}
"""(file, time of its last change) -> what stands in it."""
CONFIGURATIONS: dict[tuple[tuple[str, ...], tuple[plugins.Plugin, ...]], dict[str, Any]] = {}
"""(words, plugins) -> what they compose to."""


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


# Not in a fixture: many parameters are composed while tests are collected.
compose.initialize_config_dir = kept_session
compose.from_words = kept_words
OmegaConf.load = staticmethod(kept_file)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that only pretend, where there may be no GPU."""
    from helpers import PretendedGraph  # imports the model, which most files do without

    from pi0exp.graphs import capture

    monkeypatch.setattr(capture, "Graph", PretendedGraph)


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    """A study of a test's own, in a store that it shares with others."""
    return "".join(c if c.isalnum() else "_" for c in request.node.name)
