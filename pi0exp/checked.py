"""Apply a stack and hold each option to its word while it is applied, whatever the stack is applied to."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pi0exp import build, verify
from pi0exp.config import Stack
from pi0exp.option import Numerics, Option
from pi0exp.policy import Policy
from pi0exp.precision.option import PrecisionOption
from pi0exp.subject import Progress


@dataclass
class Checked:
    """found: what the whole stack computes. failures: one sentence for each option that changed what it may not.

    build_s: seconds of applying. first_call_s: of the first call after each option: compilation, capture, choices.
    """

    found: Sequence[Tensor]
    failures: list[str] = field(default_factory=list)
    build_s: float = 0.0
    first_call_s: float = 0.0


def apply_checked(
    policy: Policy,
    stack: Stack,
    run: Callable[[int], list[Tensor]],
    plain: Sequence[Tensor],
    progress: Progress,
    of: str = "actions",
) -> Checked:
    """Apply `stack` to `policy`; EXACT options must change nothing.

    run: computes the first so many of the inputs that are checked. plain: what came of all of them before. of: what
    these are, for reasons.
    """
    done = Checked(plain)
    known = True  # whether done.found is of the policy as it is now

    start = time.perf_counter()

    def before(option: Option) -> None:
        """Only an EXACT option is compared with what was before it: nothing else is worth the calls."""
        nonlocal known, start
        if option.numerics is Numerics.EXACT and not known:
            began = time.perf_counter()
            done.found, known = run(len(plain)), True
            start += time.perf_counter() - began

    for group, option in build.apply_stack(policy, stack, before):
        done.build_s += time.perf_counter() - start
        # A precision always says which one it is; if it says more, it has changed the model.
        if not isinstance(option, PrecisionOption) or len(policy.applied[group]) > 1:
            progress(f"verify: {group}")
            start = time.perf_counter()
            run(1)
            done.first_call_s += time.perf_counter() - start
            known = option.numerics is Numerics.EXACT
            if known:
                after = run(len(plain))
                if difference := verify.unequal(done.found, after, of):
                    done.failures.append(f"{group} {difference}")
                done.found = after
        start = time.perf_counter()
    if not known:
        done.found = run(len(plain))
    return done
