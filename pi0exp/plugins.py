"""Options of other distributions: their yaml files, and what stands for their code in the key of a point.

A distribution registers the package that holds its yaml files, laid out as `conf/`, under the entry point group
`pi0exp.options`. Hydra then finds `attention/mine.yaml` there as it finds our own. Imports nothing heavy: `--help`
asks too, and so should the `__init__` of such a package.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pi0exp.errors import UserError

GROUP = "pi0exp.options"
"""The group of the entry points."""
OURS = "pi0exp"


@dataclass(frozen=True)
class Plugin:
    """A distribution that brings options.

    distribution, version: what is installed. package: the dotted name that its entry point gives. folder: where its
    yaml files are.
    """

    distribution: str
    version: str
    package: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    def files(self) -> Iterator[tuple[str, str, Path]]:
        """(group, option, file) of each yaml file that stands in a folder."""
        for file in sorted(self.folder.glob("*/*.yaml")):
            yield file.parent.name, file.stem, file


@cache
def installed() -> tuple[Plugin, ...]:
    """The plugins of this Python, by name. Raises UserError that names the distribution of one that is broken."""
    found = {_plugin(point) for point in metadata.entry_points(group=GROUP)}
    return tuple(sorted(found, key=lambda plugin: (plugin.distribution, plugin.package)))


def _plugin(point: metadata.EntryPoint) -> Plugin:
    distribution = point.dist.name if point.dist is not None else point.name
    where = f"{distribution}: the entry point {point.name} = {point.value!r} of {GROUP}"
    try:
        spec = find_spec(point.value)
    except (ImportError, ValueError) as error:
        raise UserError(f"{where} cannot be loaded: {error}") from error
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders or not Path(folders[0]).is_dir():
        raise UserError(f"{where} is no package on disk")
    return Plugin(distribution, point.dist.version if point.dist else "", point.value, Path(folders[0]).resolve())


def foreign_sources(node: Any) -> dict[str, str]:
    """Top-level package -> version and digest of its files, of every class in `node` that is not ours.

    node: a composed configuration; classes stand in its `_target_`s. The version is that of a plugin, if it is one.
    """
    packages = sorted({target.partition(".")[0] for target in _targets(node)} - {OURS})
    versions = {plugin.package.partition(".")[0]: str(plugin) for plugin in installed()}
    return {name: " ".join(filter(None, [versions.get(name), _digest(name)])) for name in packages}


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for inner in node:
            yield from _targets(inner)
    if isinstance(node, dict):
        for key, inner in node.items():
            if key == "_target_" and isinstance(inner, str):
                yield inner
            else:
                yield from _targets(inner)


@cache
def _digest(package: str) -> str:
    """16 hex digits over names and bytes of all files of a top-level package or module; "" where there is none.

    Read once, so that an edit meanwhile does not change the keys of this process.
    """
    spec = find_spec(package)
    if spec is None:
        return ""
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(file.relative_to(top).as_posix(), file) for top in folders for file in top.rglob("*") if file.is_file()]
    if not folders and spec.has_location and spec.origin is not None:
        files = [(Path(spec.origin).name, Path(spec.origin))]
    digest = hashlib.sha256()
    for name, file in sorted(files):
        if "__pycache__" not in file.parts:
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
