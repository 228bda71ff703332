"""The points of a sweep, and what may stand beside a study.

params: key -> values, every combination is a point. points: lines of words, each a point beside every combination of
`params`; for what is no grid, such as a stack less one option at a time. Words of the command line hold for all points;
one that names a key of `params` takes the place of its values.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pi0exp import compose
from pi0exp.errors import UserError

Point = dict[str, str]
"""Key -> word of the command line, in order: {"attention": "attention=sdpa"}."""


def expanded(params: Mapping[str, str], points: Sequence[str], arguments: Sequence[str]) -> list[list[str]]:
    """The words of each point. Within Hydra's run or a `compose.session`."""
    shared = combinations([*(f"{key}={values}" for key, values in params.items()), *arguments])
    lines = [line for text in points for line in combinations(shlex.split(text))] or [{}]
    return [list((base | line).values()) for base in shared for line in lines]


def combinations(words: Sequence[str]) -> list[Point]:
    """Every combination of the values that these words give their keys; of two words with one key the last counts."""
    parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(list(words))
    values: dict[str, list[str]] = {}
    for one in parsed:
        key = one.get_key_element()
        swept = one.sweep_string_iterator() if one.is_sweep_override() else [one.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in swept]
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def key_of(word: str) -> str:
    return word.partition("=")[0]


def planned(words: Sequence[str]) -> list[list[str]]:
    """The words of each point of a sweep that is started with these: planned(["study=ladder", "model=tiny"]).

    Raises UserError.
    """
    with compose.session():
        first = list(combinations(words)[0].values())
        composed = hydra_compose("config", overrides=first, return_hydra_config=True)
        sweeper: Any = OmegaConf.to_container(composed.hydra.sweeper, resolve=True)
        arguments = [word for word in words if not word.startswith("hydra.")]
        return expanded(sweeper["params"] or {}, sweeper["points"] or [], arguments)


# ---- what may stand beside a study


def check_arguments(study: str, params: Mapping[str, str], points: Sequence[str], arguments: Sequence[str]) -> None:
    """Raises UserError where the command line sets what the points of a study are there to vary.

    It would win over every one of them, and points that bear different names would be the same.
    """
    lines = [word for text in points for word in shlex.split(text)]
    varied = {key_of(word) for word in lines}
    stacks = [word for word in lines if key_of(word) == "stack"]
    given = {key_of(word): word for word in arguments}
    if "stack" in params:
        stacks.append(given.get("stack", f"stack={params['stack']}"))
    inside = {key for stack in stacks for one in combinations([stack]) for key in stack_keys(one["stack"][6:])}
    for mine, word in given.items():
        beside = {key for key in params if key != mine}
        for keys, what in ((varied | beside, "point"), (inside, "stack")):
            if theirs := next((key for key in sorted(keys) if overlap(mine.lstrip("+~"), key)), None):
                raise UserError(
                    f"{word} would hold for every {what} of study={study}, which varies {theirs} itself;"
                    " leave one of the two out"
                )


def overlap(mine: str, theirs: str) -> bool:
    """Whether one of two keys holds the other. A group only chooses its option; settings beside it are others."""
    inner, outer = sorted((mine, theirs), key=len, reverse=True)
    return inner == outer or ("." in outer and inner.startswith(f"{outer}."))


def stack_keys(stack: str) -> set[str]:
    """What a named stack sets, itself or through the stack it builds on: groups, and settings as fusion.rewrites.x."""
    path = compose.files()["stack"].get(stack)
    if path is None:
        raise UserError(f"stack={stack}: no such stack; there are {', '.join(compose.files()['stack'])}")
    body = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(body, dict)
    keys = set(_leaves({str(key): value for key, value in body.items() if key != "defaults"}))
    for entry in body.get("defaults", []):
        if isinstance(entry, str):
            keys |= stack_keys(entry) if entry != "_self_" else set()
        else:
            keys |= {str(key).removeprefix("override ").lstrip("/") for key in entry}
    return keys


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values that are no dicts with something in them."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
