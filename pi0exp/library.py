"""Pi0 as a library: the very object that the benchmark times."""

from collections.abc import Sequence

import torch

from pi0exp import compose, config
from pi0exp.errors import UnsupportedError
from pi0exp.measure import target_machine
from pi0exp.policy import Policy
from pi0exp.policy_subject import PolicySubject


def load_policy(
    stack: str | None = None,
    model: str = "pi0",
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> Policy:
    """The policy with a stack of optimizations, ready for `sample_actions(observation, noise)`.

    stack: a name in `conf/stack/`; None is plain PyTorch. model: a name in `conf/model/`. checkpoint: a directory or a
    name on the hub; None draws random weights. overrides: whatever else the command line takes, for example
    ["attention=sdpa", "workload.horizon=50"]. device: auto, gpu or cpu.

    The first call of each new structure of observations may compile or capture. Raises UserError for a setting or a
    checkpoint that cannot be used, UnsupportedError where this machine cannot run the stack.
    """
    words = [f"model={model}", f"measure.device={device}", *overrides]
    words += [f"stack={stack}"] if stack is not None else []
    words += [f"model.checkpoint={checkpoint}"] if checkpoint is not None else []
    plain = compose.from_words(words)
    subject = PolicySubject.from_plain(plain)
    machine, reasons = target_machine(config.measure(plain).device)
    if reasons := reasons + subject.unmet(machine):
        raise UnsupportedError("; ".join(reasons))
    return subject.policy(torch.device("cuda", 0) if machine.has_gpu else torch.device("cpu"))
