"""Which differences does an interleaved comparison find, and does it find some where there are none?

    python experiments/resolution.py OUT.json [WORDS...]

Compares as `python -m pi0exp.compare --rerun` does, 20 times in one process, a stack with itself (`same`), and with
itself and a kernel in its graph that waits for 3 % of a call (`planted`). WORDS choose stack, model and workload
(default: stack=h200_best workload=masked). The second of each two is built anew, so that its memory lies elsewhere.

Writes after each comparison: all samples of both, the interval and the verdict; how often a difference was found; the
largest ratio of a stack to itself, which `pi0exp.intervals.MARGIN` must exceed; the machine. Numbers of kernels in the
graphs show that the wait is inside: one more. Correctness is not checked here.

    python experiments/resolution.py OUT.json --again

Works out intervals and verdicts of OUT.json anew from its samples: for when `pi0exp.intervals` has changed.

On a CPU (measure.device=cpu) the host waits instead: for trying it out, no evidence of anything.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from scipy import stats
from torch import Tensor

from pi0exp import compose, config, intervals
from pi0exp.errors import UserError
from pi0exp.graphs.manual import Manual
from pi0exp.interleave import DEFAULT_ROUNDS, Call, interleave, pairs
from pi0exp.machine import set_environment
from pi0exp.measure import fingerprint, target_machine
from pi0exp.model.observation import Observation
from pi0exp.option import Option
from pi0exp.passes import gpu_sensors, state, told
from pi0exp.policy import DeviceCall, Policy
from pi0exp.policy_subject import PolicySubject
from pi0exp.timing import device_sample_ms, quiet, warm_up

PLANTED = 0.03
PAIRS = 20
INPUTS = 8
SAME, WITH_DELAY = "same", "planted"
KERNELS = "graphs/kernels"
Sample = Callable[[Call, int], float]
Build = Callable[[float], tuple[Call, dict[str, float]]]
"""Milliseconds of delay -> a call that is built anew and warm, with counters of its graphs."""


@dataclass(frozen=True)
class Delayed(Option):
    """`inner`, an option of graphs, around a call that first waits on the device for `cycles` of its clock."""

    inner: Option
    cycles: int

    def apply(self, policy: Policy) -> None:
        def delayed(call: DeviceCall) -> DeviceCall:
            def waiting(observation: Observation, noise_BCA: Tensor) -> Tensor:
                if policy.device.type == "cuda":
                    torch.cuda._sleep(self.cycles)
                else:
                    host_wait(self.cycles)
                return call(observation, noise_BCA)

            return waiting

        policy.wrap_call(delayed, f"a kernel that waits for {self.cycles} cycles, then the call")
        self.inner.apply(policy)


def host_wait(cycles: int) -> None:
    """Of a CPU: nanoseconds."""
    end = perf_counter() + cycles / 1e9
    while perf_counter() < end:
        pass


def with_delay(subject: PolicySubject, cycles: int) -> PolicySubject:
    return replace(subject, stack=replace(subject.stack, graphs=Delayed(subject.stack.graphs, cycles)))


def cycles_per_ms(device: torch.device, busy: Call) -> float:
    """Of the clock that the wait counts, as it runs between calls of the stack: a load may hold it down."""
    if device.type != "cuda":
        return 1e6
    cycles, times = 1_000_000, list[float]()
    for index in range(10):
        busy(index)
        times.append(device_sample_ms(lambda index: torch.cuda._sleep(cycles), 0, device))
    return cycles / median(times)


class Builder:
    """Builds policies of one subject, each on inputs that rotate."""

    def __init__(self, subject: PolicySubject, device: torch.device) -> None:
        self.subject, self.device = subject, device
        self.items = subject.on_device(subject.inputs(INPUTS).items, device)
        self.rate: float | None = None

    def __call__(self, delay_ms: float) -> tuple[Call, dict[str, float]]:
        """The first one must have no delay: by it the clock is measured."""
        delayed = with_delay(self.subject, round(delay_ms * (self.rate or 0.0))) if delay_ms else self.subject
        policy = delayed.policy(self.device)

        def call(index: int) -> None:
            policy.sample_actions(*self.items[index % len(self.items)])

        warm_up(call, self.device, config.MeasureConfig(warmup_s=0.5, warmup_max_s=10.0))
        if not delay_ms:
            self.rate = cycles_per_ms(self.device, call)
        return call, policy.counters()


def comparisons(build: Build, sample: Sample, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """`count` times: a subject with itself, and with itself delayed by the share PLANTED of its median call."""
    first, graphs = build(0.0)
    for _ in range(count):
        second, counters = build(0.0)
        yield {"kind": SAME, **compared(first, second, sample, rounds), **kernels(graphs, counters)}
        first, graphs, second = second, counters, first  # of the two the older one goes before the next is built
        del second
        clear()
        delay_ms = PLANTED * median(sample(first, index) for index in range(4 * INPUTS))
        slower, counters = build(delay_ms)
        found = compared(first, slower, sample, rounds)
        yield {"kind": WITH_DELAY, "delay_ms": delay_ms, **found, **kernels(graphs, counters)}
        del slower
        clear()


def compared(a: Call, b: Call, sample: Sample, rounds: int) -> dict[str, Any]:
    with quiet():
        taken = interleave(a, b, sample, rounds, INPUTS)
    a_ms, b_ms = ([round(ms, 5) for ms in side] for side in taken)  # as they are written; events count in 0.0005 ms
    return judged({"a_ms": a_ms, "b_ms": b_ms})


def judged(one: dict[str, Any]) -> dict[str, Any]:
    """A comparison's samples, and what follows from them."""
    interval = intervals.of_rounds(pairs(one["a_ms"], one["b_ms"], INPUTS))
    found = {"ratio": interval.ratio, "low": interval.low, "high": interval.high}
    return one | found | {"verdict": intervals.word(interval)}


def kernels(a: dict[str, float], b: dict[str, float]) -> dict[str, Any]:
    return {"kernels": [a[KERNELS], b[KERNELS]]} if KERNELS in a and KERNELS in b else {}


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def misplaced(one: dict[str, Any]) -> bool:
    """Whether the wait is not one more kernel of the graph, or there is one where there should be none."""
    a, b = one["kernels"]
    return bool(b - a != (one["kind"] == WITH_DELAY))


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """How often a difference was found: false alarms where there is none, planted slowdowns that were seen.

    Rates with the one-sided 95 % limit of Clopper and Pearson on their bad side.
    """
    same, planted = ([one for one in found if one["kind"] == kind] for kind in (SAME, WITH_DELAY))
    alarms = sum(one["verdict"] != intervals.NOTHING for one in same)
    seen = sum(one["verdict"] == intervals.SLOWER for one in planted)
    made: dict[str, Any] = {SAME: {"of": len(same), "false_alarms": alarms}, WITH_DELAY: {"of": len(planted)}}
    if same:
        upper = float(stats.beta.ppf(0.95, alarms + 1, len(same) - alarms)) if alarms < len(same) else 1.0
        largest = max(abs(one["ratio"] - 1) for one in same)
        made[SAME] |= {"rate": alarms / len(same), "rate_at_most": upper, "largest_difference": largest}
    if planted:
        lower = float(stats.beta.ppf(0.05, seen, len(planted) - seen + 1)) if seen else 0.0
        made[WITH_DELAY] |= {"share": PLANTED, "found": seen, "rate": seen / len(planted), "rate_at_least": lower}
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("words", nargs="*", metavar="WORDS")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of each kind (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, help="of each comparison (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure nothing, judge the samples of OUT.json anew")
    given = parser.parse_intermixed_args(arguments)
    try:
        if given.again:
            return again(given.out)
        return run(given.out, given.words or ["stack=h200_best", "workload=masked"], given.pairs, given.rounds)
    except UserError as error:
        print(f"resolution: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def again(out: Path) -> int:
    """Raises UserError."""
    try:
        content = json.loads(out.read_text())
        made = [judged(one) for one in content["comparisons"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: no comparisons of this command: {error}") from error
    settings = content["settings"] | {"confidence": intervals.CONFIDENCE, "margin": intervals.MARGIN}
    content |= {"settings": settings, **summary(made), "comparisons": made}
    out.write_text(json.dumps(content) + "\n")
    print(json.dumps(summary(made)))
    return 0


def run(out: Path, words: list[str], count: int, rounds: int) -> int:
    """Raises UserError."""
    if count < 1 or rounds < intervals.ROUNDS:
        raise UserError(f"--pairs {count} --rounds {rounds}: at least 1 and {intervals.ROUNDS}")
    plain = compose.from_words(words)
    subject = PolicySubject.from_plain(plain)
    machine, lacking = target_machine(config.measure(plain).device)
    if reasons := [*lacking, *subject.unmet(machine)]:
        print(f"resolution: {'; '.join(reasons)}", file=sys.stderr)
        return 3
    if machine.has_gpu and not isinstance(subject.stack.graphs, Manual):
        raise UserError("graphs must be manual: the wait belongs into the graph of the call")
    set_environment(subject.environment())
    device = torch.device("cuda", 0) if machine.has_gpu else torch.device("cpu")
    sensors, _ = gpu_sensors(device)
    before = None if sensors is None else state(sensors)
    settings = {"rounds": rounds, "calls_a_block": INPUTS}
    settings |= {"confidence": intervals.CONFIDENCE, "margin": intervals.MARGIN}
    head: dict[str, Any] = {"words": words, "fingerprint": fingerprint(machine), "settings": settings}
    made: list[dict[str, Any]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    build = Builder(subject, device)
    for one in comparisons(build, lambda call, index: device_sample_ms(call, index, device), count, rounds):
        if machine.has_gpu and ("kernels" not in one or misplaced(one)):
            raise UserError(f"kernels in the graphs of A and B: {one.get('kernels', 'not counted')}; no evidence")
        made.append(one)
        if sensors is not None and before is not None:
            head["metrics"], head["facts"] = told(before, state(sensors))
        out.write_text(json.dumps({**head, **summary(made), "comparisons": made}) + "\n")
        text = f"{one['ratio']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
        print(f"{one['kind']:>7}  A {median(one['a_ms']):.3f} ms  {text}  {one['verdict']}", flush=True)
    print(json.dumps(summary(made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
