"""Absent cameras are not computed: their pictures pass no vision tower, their tokens are not in the prefix.

The same function in exact arithmetic: masked tokens are never attended to and do not advance positions. With a batch a
camera is left out only where it is absent in every row; where some rows have it, it is masked in the others.
"""

from dataclasses import dataclass

from pi0exp.model.observation import Observation
from pi0exp.option import Numerics, Option
from pi0exp.policy import Policy


@dataclass(frozen=True)
class Skip(Option):
    """Drop the cameras that no row of the batch has."""

    numerics = Numerics.REORDERED

    def apply(self, policy: Policy) -> None:
        policy.prepare_with(without_absent_cameras, "without cameras that no row has")


def without_absent_cameras(observation: Observation) -> Observation:
    """The same observation; cameras absent in every row are left out."""
    keep = [name for name, presence in observation.structure.cameras if presence != "none"]
    return observation if len(keep) == len(observation.images) else observation.only_cameras(keep)
