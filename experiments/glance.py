"""How long calls of stacks take, and which kernels they are, without verification: a look, not a measurement to quote.

    python experiments/glance.py OUT.json stack=9_blocks -- stack=9_blocks workload.horizon=50 -- stack=h200_best

Each group of words, divided by --, is a stack on a workload. A policy is built with random weights, warmed up and timed
60 times with device events; 3 more calls are profiled. A second or two a stack, once its kernels are compiled. Written:
the samples, milliseconds and number of each kernel in one call, the machine. In a chain of dependent launches a
kernel's time contains its wait for the one in front: the times of its kernels overlap.

Exit codes: 0; 2 wrong words; 3 no GPU.
"""

import gc
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.profiler import ProfilerActivity, profile

from pi0exp import compose
from pi0exp.errors import UserError
from pi0exp.machine import set_environment, this_machine
from pi0exp.measure import fingerprint
from pi0exp.policy_subject import PolicySubject
from pi0exp.result import CONFIG_ERROR, Outcome
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
    set_environment(subject.environment())
    policy = subject.policy(device)
    items = subject.on_device(subject.inputs(INPUTS).items, device)

    def call(index: int) -> None:
        policy.sample_actions(*items[index % INPUTS])

    for index in range(WARM):
        call(index)
    samples = [device_sample_ms(call, index, device) for index in range(CALLS)]
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for index in range(PROFILED):
            call(index)
        torch.cuda.synchronize(device)
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            kernels[event.name][0] += event.device_time / 1e3 / PROFILED
            kernels[event.name][1] += 1 / PROFILED
    table = sorted(([name, *pair] for name, pair in kernels.items()), key=lambda row: -row[1])
    return {"ms": median(samples), "samples_ms": samples, "kernels": table}


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
    if not machine.has_gpu or not torch.cuda.is_available():
        print("glance: needs a GPU that torch can use", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    device, found = torch.device("cuda", 0), list[dict[str, Any]]()
    for group, subject in chosen:
        found.append({"words": group, **glance(subject, device)})
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{' '.join(group)}: {found[-1]['ms']:.3f} ms")
        for name, ms, count in found[-1]["kernels"][:SHOWN]:
            print(f"  {ms:8.3f} ms {count:6.0f} x  {name[:90]}")
        text = json.dumps({"fingerprint": fingerprint(machine), "stacks": found})
        Path(words[0]).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
