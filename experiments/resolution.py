"""Which differences does an interleaved comparison find, and does it find some where there are none?

    python experiments/resolution.py OUT.json same [WORDS...]
    python experiments/resolution.py OUT.json planted [WORDS...]

`same` compares a stack with itself; `planted` with itself and a kernel in its graph that waits for 3 % of the call.
Both do so 20 times in one process, as `python -m pi0exp.compare --rerun` does, each time with two policies that are
built anew, so that their memory lies elsewhere. WORDS choose stack, model and workload (default: stack=h200_best).
Writes every pair of block medians, how often a difference was found, and the largest ratio of a stack to itself, which
`pi0exp.intervals.MARGIN` must exceed. Correctness is not checked here. Needs a GPU.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from scipy import stats
from torch import Tensor

from pi0exp import compose, config, intervals
from pi0exp.interleave import DEFAULT_ROUNDS, Call, interleave, pairs
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.model.observation import Observation
from pi0exp.option import Option
from pi0exp.policy import DeviceCall, Policy
from pi0exp.policy_subject import PolicySubject
from pi0exp.timing import device_sample_ms, quiet, warm_up

PLANTED = 0.03
PAIRS = 20
INPUTS = 8


@dataclass(frozen=True)
class Delayed(Option):
    """`inner`, an option of graphs, around a call that first waits on the device for `cycles` of its clock."""

    inner: Option
    cycles: int

    def apply(self, policy: Policy) -> None:
        def delayed(call: DeviceCall) -> DeviceCall:
            def waiting(observation: Observation, noise_BCA: Tensor) -> Tensor:
                torch.cuda._sleep(self.cycles)
                return call(observation, noise_BCA)

            return waiting

        policy.wrap_call(delayed, f"a kernel that waits for {self.cycles} cycles, then the call")
        self.inner.apply(policy)


def with_delay(subject: PolicySubject, cycles: int) -> PolicySubject:
    return replace(subject, stack=replace(subject.stack, graphs=Delayed(subject.stack.graphs, cycles)))


def cycles_per_ms(device: torch.device) -> float:
    """Of the clock that torch.cuda._sleep counts, while nothing else runs."""
    cycles = 20_000_000
    times = [device_sample_ms(lambda index: torch.cuda._sleep(cycles), 0, device) for _ in range(5)]
    return cycles / median(times)


def built(subject: PolicySubject, device: torch.device) -> Call:
    """A policy of its own, called on inputs that rotate, warm."""
    items = subject.on_device(subject.inputs(INPUTS).items, device)
    policy = subject.policy(device)

    def call(index: int) -> None:
        policy.sample_actions(*items[index % len(items)])

    warm_up(call, device, config.MeasureConfig(warmup_s=0.5, warmup_max_s=10.0))
    return call


def comparisons(
    subject: PolicySubject, planted: float, count: int, rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """`count` comparisons of the subject with itself, delayed by the share `planted` of its median call."""
    for _ in range(count):
        first = built(subject, device)
        cycles = 0
        if planted:
            taken = [device_sample_ms(first, index, device) for index in range(4 * INPUTS)]
            cycles = round(planted * median(taken) * cycles_per_ms(device))
        second = built(with_delay(subject, cycles) if planted else subject, device)
        with quiet():
            samples = interleave(first, second, sampler(device), rounds, INPUTS)
        found = pairs(*samples, INPUTS)
        interval = intervals.of_rounds(found)
        yield {
            "ratio": interval.ratio,
            "low": interval.low,
            "high": interval.high,
            "verdict": intervals.word(interval),
            "cycles": cycles,
            "pairs_ms": found,
        }
        del first, second
        gc.collect()
        torch.cuda.empty_cache()


def sampler(device: torch.device) -> Callable[[Call, int], float]:
    return lambda call, index: device_sample_ms(call, index, device)


def summary(found: list[dict[str, Any]], planted: float) -> dict[str, Any]:
    """How often a difference was found: the rate of false alarms, or of planted slowdowns that were seen.

    With the one-sided 95 % limit of Clopper and Pearson on its bad side.
    """
    count, hits = len(found), sum(one["verdict"] != intervals.NOTHING for one in found)
    limits = {"confidence": intervals.CONFIDENCE, "margin": intervals.MARGIN}
    if planted:
        hits = sum(one["verdict"] == intervals.SLOWER for one in found)
        lower = float(stats.beta.ppf(0.05, hits, count - hits + 1)) if hits else 0.0
        return {"planted": planted, "found": hits, "of": count, "rate": hits / count, "rate_at_least": lower, **limits}
    upper = float(stats.beta.ppf(0.95, hits + 1, count - hits)) if hits < count else 1.0
    largest = max(abs(one["ratio"] - 1) for one in found)
    rates = {
        "false_alarms": hits,
        "of": count,
        "false_positive_rate": hits / count,
        "false_positive_rate_at_most": upper,
    }
    return rates | {"largest_difference": largest, **limits}


def main() -> int:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", choices=("same", "planted"))
    parser.add_argument("words", nargs="*")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    given = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        print("resolution: needs a GPU; there is none", file=sys.stderr)
        return 3
    words = given.words or ["stack=h200_best"]
    subject = PolicySubject.from_plain(compose.from_words(words))
    planted = PLANTED if given.kind == "planted" else 0.0
    made = []
    for one in comparisons(subject, planted, given.pairs, given.rounds, torch.device("cuda", 0)):
        made.append(one)
        a_ms = median(a for a, _ in one["pairs_ms"])
        interval = f"{one['ratio']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
        print(f"{len(made):3d}  A {a_ms:.3f} ms  {interval}  {one['verdict']}", flush=True)
    total = summary(made, planted)
    print(json.dumps(total))
    head = {"command": sys.argv, "fingerprint": fingerprint(this_machine()), "words": words, "rounds": given.rounds}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(head | {"calls_a_block": INPUTS, **total, "comparisons": made}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
