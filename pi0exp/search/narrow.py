"""What a command line leaves of the space of a search, and what of it holds for every point.

    python -m pi0exp study=search workload=masked graphs=manual attention=sdpa,triton fusion.rewrites.fold_norms=false

has one workload, always one graph, and two choices for the attention of each stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pi0exp import compose, sweep
from pi0exp.config import GROUPS
from pi0exp.errors import UserError


@dataclass(frozen=True)
class Narrowed:
    """base: words that hold for every point, `study=search` among them. search: those of the search itself.

    choices: key of a word -> its values, of the words that narrow a factor, or all stages of a group.
    """

    base: list[str]
    search: list[str]
    choices: dict[str, list[str]]

    def of(self, factors: Mapping[str, Sequence[str]], left_out: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The factors with the choices that are left. Raises UserError for a choice or a key that is not there."""
        kept = {name: list(choices) for name, choices in factors.items()}
        for key, values in self.choices.items():
            # A word for all stages beside one for a single stage: the latter is more special, wherever it stands.
            mine = [name for name in kept if name == key or (name.startswith(f"{key}.") and key not in kept)]
            mine = [name for name in mine if name == key or name not in self.choices]
            if not mine:
                varied = key.partition(".")[0]
                raise UserError(
                    f"{key}={','.join(values)} would hold for every point of study=search, which varies {varied}"
                    f" itself; it can be told {', '.join(_keys(factors, varied))}"
                )
            for name in mine:
                kept[name] = [_checked(name, value, kept[name], left_out) for value in values]
        for name, choices in kept.items():
            if not choices:
                raise UserError(f"{name}: none of its options can run here")
        return kept


def narrowed(arguments: Sequence[str]) -> Narrowed:
    """Sort the words of a command line. Within Hydra's run or a `compose.session`. Raises UserError."""
    base, search, choices = [], [], {}
    for word in arguments:
        key = sweep.key_of(word).lstrip("+~")
        group = key.partition(".")[0]
        values = [point.popitem()[1].partition("=")[2] for point in sweep.combinations([word])]
        if group == "search":
            search.append(word)
        elif key == "stack":
            raise UserError(
                f"{word} would hold for every point of study=search; search.stacks names those to begin with"
            )
        elif group in GROUPS and (group != "precision" or (key == group and len(values) > 1)):
            choices[key] = [value.lower() if value in ("True", "False") else value for value in values]
        elif len(values) > 1:
            raise UserError(f"{word}: one search is of one {key}; start a command for each")
        else:
            base.append(word)
    return Narrowed(base, search, choices)


def _checked(factor: str, value: str, choices: Sequence[str], left_out: Mapping[str, Sequence[str]]) -> str:
    if value in choices:
        return value
    group = factor.partition(".")[0]
    if reasons := left_out.get(f"{group}={value}"):
        raise UserError(f"{factor}={value} can be no part of a search here: {'; '.join(reasons)}")
    there = compose.files()[group] if factor == group else choices
    raise UserError(f"{factor}={value}: no such choice; there are {', '.join(there)}")


def _keys(factors: Mapping[str, Sequence[str]], group: str) -> list[str]:
    """What the command line may narrow of a group."""
    own = [name for name in factors if name.partition(".")[0] == group]
    return own if group in own else [group, *own]
