"""What each exact rewrite is worth alone, on top of a stack:  python experiments/rewrites.py OUT.json [WORDS...]

WORDS of the command line choose model, workload and the stack underneath (default: stack=4_projections). One process:
the stack alone and with each rewrite are captured once, then take turns, eight observations rotating; milliseconds of a
call on the device, differences of medians over the same rounds. Correctness is not checked here: `python -m pi0exp` and
the tests do that.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from pi0exp import compose
from pi0exp.fusion.rewrites import Rewrites
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.policy_subject import PolicySubject
from pi0exp.timing import device_sample_ms, quiet

ROUNDS = 8
"""Of eight calls each."""


def main(target: str, words: list[str]) -> int:
    if not torch.cuda.is_available():
        print("rewrites: needs a GPU; there is none", file=sys.stderr)
        return 3
    device, names = torch.device("cuda", 0), [one.name for one in fields(Rewrites)]
    words = words or ["stack=4_projections"]
    variants = {"alone": words} | {name: [*words, f"fusion.rewrites.{name}=true"] for name in names}
    variants["all of them"] = [*words, *(f"fusion.rewrites.{name}=true" for name in names)]
    calls = {}
    for name, given in variants.items():
        subject = PolicySubject.from_plain(compose.from_words(given))
        items = subject.on_device(subject.inputs(8).items, device)
        policy = subject.policy(device)
        lines = policy.applied["fusion"]
        if name in names and any(line.startswith(f"{name}: nothing to do") for line in lines):
            continue

        def call(index: int, policy=policy, items=items) -> None:  # type: ignore[no-untyped-def]
            policy.sample_actions(*items[index % len(items)])

        for index in range(8):
            call(index)
        calls[name] = call
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with quiet():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                samples[name] += [device_sample_ms(call, index, device) for index in range(8)]
    ms = {name: median(values) for name, values in samples.items()}
    for name, value in ms.items():
        print(f"{name:20s} {value:7.3f} ms  {value - ms['alone']:+.3f}")
    found = {"command": sys.argv, "fingerprint": fingerprint(this_machine()), "words": words}
    Path(target).write_text(json.dumps(found | {"ms": ms, "samples_ms": samples}, indent=1))
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(str(__doc__))
    sys.exit(main(sys.argv[1], sys.argv[2:]))
