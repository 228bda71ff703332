"""How long calls of stacks take, and which kernels they are, without verification: a look, not a measurement to quote.

    python experiments/glance.py OUT.json stack=9_blocks -- stack=9_blocks workload.horizon=50 -- stack=h200_best

Each group of words, divided by --, is a stack on a workload. A policy is built with random weights, warmed up and timed
60 times; 3 more calls are profiled. A second or two a stack, once its kernels are compiled. Written: the samples, the
breakdown of a call, the machine. In a chain of dependent launches a kernel begins, and waits, while the one in front
runs: that time counts for the one in front alone (pi0exp/timeline.py).

Exit codes: 0; 2 wrong words; 3 no GPU, or a stack that it cannot run.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from pi0exp import compose
from pi0exp.breakdown import break_down
from pi0exp.breakdown_text import text
from pi0exp.errors import UserError
from pi0exp.machine import set_environment, this_machine
from pi0exp.measure import fingerprint
from pi0exp.policy_subject import PolicyInstance, PolicySubject
from pi0exp.profiling import TRACE, profile
from pi0exp.result import CONFIG_ERROR, Outcome
from pi0exp.subject import Verdict
from pi0exp.timing import device_sample_ms

INPUTS, WARM, CALLS, PROFILED, SHOWN = 4, 6, 60, 3, 25


def groups(words: list[str]) -> list[list[str]]:
    """The words between --."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            found.append([])
        else:
            found[-1].append(word)
    return [group for group in found if group]


def glance(subject: PolicySubject, device: torch.device) -> dict[str, Any]:
    """Samples, and what the profile says."""
    set_environment(subject.environment())
    items = subject.on_device(subject.inputs(INPUTS).items, device)
    instance = PolicyInstance(subject, subject.policy(device), Verdict(), {}, {}, [], items)
    for index in range(WARM):
        instance.call(index)
    samples = [device_sample_ms(instance.call, index, device) for index in range(CALLS)]
    with tempfile.TemporaryDirectory() as folder:
        found = break_down(profile(instance, PROFILED, None, Path(folder, TRACE)))
    print(f"{median(samples):.3f} ms\n{text(found, SHOWN)}\n", flush=True)
    return {"ms": median(samples), "samples_ms": samples, "breakdown": found.to_dict()}


def main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0 if words else CONFIG_ERROR
    try:
        chosen = [(group, PolicySubject.from_plain(compose.from_words(group))) for group in groups(words[1:])]
    except UserError as error:
        print(f"glance: {error}", file=sys.stderr)
        return CONFIG_ERROR
    machine = this_machine()
    lacking = [] if machine.has_gpu else ["it needs a GPU, and there is none that torch can use"]
    if reasons := lacking + [reason for _, subject in chosen for reason in subject.unmet(machine)]:
        print(f"glance: {'; '.join(dict.fromkeys(reasons))}", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    found: list[dict[str, Any]] = []
    for group, subject in chosen:
        print(f"# {' '.join(group)}")
        found.append({"words": group, **glance(subject, torch.device("cuda", 0))})
        Path(words[0]).write_text(json.dumps({"fingerprint": fingerprint(machine), "stacks": found}) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
