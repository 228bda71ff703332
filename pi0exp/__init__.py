"""Which optimization stack runs the Pi0 robot policy fastest, what does each part bring, are the actions the same?

policy = pi0exp.load_policy(model="pi0", stack="2_sdpa", checkpoint="path/to/checkpoint")
actions = policy.sample_actions(observation)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi0exp.errors import UnsupportedError, UserError
    from pi0exp.library import load_policy
    from pi0exp.model.observation import Observation, observation_from_arrays
    from pi0exp.policy import Policy

# Looked up on first use: importing the package must stay fast for the command line.
_HOMES = {
    "load_policy": "pi0exp.library",
    "Observation": "pi0exp.model.observation",
    "observation_from_arrays": "pi0exp.model.observation",
    "Policy": "pi0exp.policy",
    "UserError": "pi0exp.errors",
    "UnsupportedError": "pi0exp.errors",
}

__all__ = ["Observation", "Policy", "UnsupportedError", "UserError", "load_policy", "observation_from_arrays"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pi0exp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
