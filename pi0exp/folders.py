"""Where Hydra finds options beside `conf`: studies, and what plugins bring."""

import builtins
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin

from pi0exp import plugins

EXPERIMENTS = Path(__file__).resolve().parent / "experiments"


class Studies(FileConfigSource):
    """`experiments`, in which the studies are options and nothing else is.

    For `--help` Hydra asks each folder that it is told of, and those of the results are many.
    """

    @staticmethod
    def scheme() -> str:
        return "studies"

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        found = super().list(config_path, results_filter)
        return found if config_path else [name for name in found if name == "study"]


class Folders(SearchPathPlugin):
    """Lets study=NAME find experiments/study/NAME.yaml, and attention=NAME the attention/NAME.yaml of a plugin."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("pi0exp-experiments", f"{Studies.scheme()}://{EXPERIMENTS}")
        for plugin in plugins.installed():
            search_path.append(str(plugin), f"file://{plugin.folder}")
