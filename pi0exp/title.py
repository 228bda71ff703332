"""What a point is called: what is measured, and the stack's name or the words of it that are not plain."""

from collections.abc import Mapping
from functools import cache

from pi0exp import compose

_WHAT = ("model", "workload")
"""Choices that a title begins with."""
_UNNAMED = ("measure", "stack", "study", "subject")
"""How it is measured is no part of what it is; stack and study are names of other choices, a subject goes in front."""
_SIGNS = {"true": "+", "false": "-"}


def title(params: Mapping[str, str]) -> str:
    """From the parameters of a run: `pi0  default  attention=sdpa graphs=manual`, `pi0  masked  8_compiled`."""
    plain = _defaults()
    options = {name: value for name, value in params.items() if _group(name) in plain.keys() - {*_WHAT, *_UNNAMED}}
    special = [word(name, value) for name, value in options.items() if plain.get(name) != value]
    subject = {name: value for name, value in params.items() if name.startswith("subject.")}
    what = [params["subject"], *(word(*pair) for pair in subject.items())] if "subject" in params else []
    what += [params[name] for name in params if "." not in name and name not in {*options, *_UNNAMED}]
    return "  ".join([*what, params.get("stack") or " ".join(special) or "plain"])


@cache
def _defaults() -> dict[str, str]:
    return compose.defaults()


def _group(name: str) -> str:
    return name.split(".")[0]


def word(name: str, value: str) -> str:
    """An option or a setting as on the command line, but +batch_cameras for fusion.rewrites.batch_cameras=true."""
    rewrite = name.removeprefix("fusion.rewrites.")
    if rewrite != name and value in _SIGNS:
        return _SIGNS[value] + rewrite
    return f"{name}={value}"
