"""What a misspelt word of the command line may have meant, where Hydra says of it only that it is not there."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pi0exp import compose
from pi0exp.errors import UserError

_NO_KEY = re.compile(r"Could not override '([^']+)'")
_NO_NAME = "Config group override must be a string"
"""What Hydra says of an option that reads as a number: stack=9."""


def on(error: Exception, words: Sequence[str]) -> str:
    """An error of Hydra on one line, with what there is instead. words: of the command line."""
    text = compose.one_line(error)
    pairs = [(key.lstrip("+~"), value) for key, equals, value in (word.partition("=") for word in words) if equals]
    groups = {group: list(files) for group, files in compose.files().items()}
    if text.startswith(_NO_NAME):
        named = ((group, name) for group, names in pairs if group in groups for name in names.split(","))
        wrong = [(group, name) for group, name in named if name.isdigit() and name not in groups[group]]
        return next((f"{group}={name}: {_instead(name, groups[group], 'option')}" for group, name in wrong), text)
    if found := _NO_KEY.search(text):
        chosen = [f"{group}={name}" for group, name in pairs if name in groups.get(group, ())]
        return _missing(found[1], chosen, sorted({*compose.OWN, *groups})) or text
    return text


def _missing(key: str, chosen: list[str], groups: list[str]) -> str:
    """Which part of a dotted key is not there, and what is; "" where that cannot be told."""
    first, *others = key.split(".")
    if first not in groups:
        return f"{key}: {_instead(first, groups, 'group or setting')}"
    try:
        made = compose.from_words(chosen)
    except UserError:
        return ""
    if first not in made and first in compose.files()["study"]:
        return f"{key}: only study={first} has this setting"
    node: Any = made.get(first)
    for part in others:
        if not isinstance(node, dict):
            return ""
        if part not in node and "_target_" in node and (having := _having(first, part)):
            name = made["names"][first]
            return f"{key}: {first}={name} has no setting {part}; it is one of {first}={', '.join(having)}"
        if part not in node:
            return f"{key}: {_instead(part, [name for name in node if not name.startswith('_')], 'setting')}"
        node = node[part]
    return ""


def _having(group: str, setting: str) -> list[str]:
    """The options of a group that have this setting."""
    with compose.session():
        return [name for name in compose.files()[group] if setting in compose.option_node(group, name)]


def _instead(word: str, names: list[str], kind: str) -> str:
    near = difflib.get_close_matches(word, names, 1) or [name for name in names if name.startswith(f"{word}_")][:1]
    meant = f", {near[0]} perhaps" if near else ""
    return f"there is no {kind} {word}{meant}; there are {', '.join(sorted(names)) or 'none'}"
