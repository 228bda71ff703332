"""Apply a stack to a policy, option by option, in the order of the stack's fields."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from pi0exp.config import Stack
from pi0exp.option import Numerics, Option
from pi0exp.policy import Policy

if TYPE_CHECKING:
    from pi0exp.machine import Machine


def apply_stack(
    policy: Policy, stack: Stack, before: Callable[[Option], None] = lambda option: None
) -> Iterator[tuple[str, Option]]:
    """Apply the options one after the other; yields (group, option) after each that changed the policy.

    before: is called with each option that can change the policy, while it has not. Where an option differs between
    stages, the one that promises least speaks for all of them.
    """
    for group, option in stack.options():
        policy.begin(group)
        spokesman = max((part for _, part in option.parts()), key=lambda part: part.numerics.rank)
        if not option.idle:
            before(spokesman)
        with torch.no_grad():
            option.apply(policy)
        if group in policy.applied:
            yield group, spokesman


def unmet(stack: Stack, machine: "Machine") -> list[str]:
    """Why this stack cannot run on that machine, and which of its options exclude each other."""
    needs = [f"{group}: {reason}" for group, option in stack.parts() for reason in option.unmet(machine)]
    return needs + [f"{group}: {reason}" for group, option in stack.parts() for reason in option.clashes(stack)]


def numerics(stack: Stack) -> Numerics:
    """The word of the stack as a whole: that of its weakest option."""
    return max((option.numerics for _, option in stack.parts()), key=lambda word: word.rank)


def bound(stack: Stack) -> float | None:
    """The error that the stack's APPROXIMATE options allow together; None where one of them promises nothing."""
    bounds = [option.bound for _, option in stack.parts() if option.numerics is Numerics.APPROXIMATE]
    stated = [value for value in bounds if value is not None]
    return sum(stated) if bounds and len(stated) == len(bounds) else None


def process_wide(stack: Stack) -> dict[str, Option]:
    """Group -> option, of the options that set something for the whole process: two stacks cannot differ in them."""
    return {group: option for group, option in stack.parts() if option.holds() or option.environment()}


def environment(stack: Stack) -> dict[str, str]:
    """Variables of the environment that the options of the stack need."""
    return {name: value for _, option in stack.parts() for name, value in option.environment().items()}


def proofs(stack: Stack) -> list[tuple[str, str]]:
    """What a GPU profile must show of every option that can be shown."""
    return [(group, pattern) for group, option in stack.parts() for pattern in option.proofs()]
