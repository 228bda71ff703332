"""Measure two points in one process, taking turns:  python -m pi0exp.interleave PAIR.json RESULT.json

PAIR.json is {"a": EXPERIMENT, "b": EXPERIMENT, "rounds": N}, each experiment as in `pi0exp.measure`. Both are built and
verified, then blocks of calls run A B B A, round after round: what drifts, drifts for both, and what drifts steadily
cancels within a round. A block is one call on each input, so that both compute the same. RESULT.json receives the
`Result` of B; A's numbers stand beside B's under names that begin with `baseline`.

Both models are resident. Weights are not shared: options rewrite them in place.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pi0exp import config, subject
from pi0exp.errors import UserError
from pi0exp.intervals import ROUNDS
from pi0exp.isolate import measure_isolated
from pi0exp.machine import set_environment
from pi0exp.measure import fingerprint, main, progress, target_machine
from pi0exp.result import Outcome, Result

NAME = "pi0exp.interleave"
BASELINE = "baseline"
"""Begins the names of A's metrics (`baseline/latency_ms/p50`), samples (`baseline_latency_ms`) and applied options."""
DEFAULT_ROUNDS = 20
"""Of four blocks each. The rate of false alarms is then the nominal one (tests), and a call of 20 ms takes 13 s."""

Call = Callable[[int], None]
Pair = tuple[float, float]
"""Milliseconds of A and of B in one round."""


def interleave(
    a: Call, b: Call, sample: Callable[[Call, int], float], rounds: int, block: int, max_s: float = float("inf")
) -> tuple[list[float], list[float]]:
    """Samples of A and of B in the order in which they were taken: blocks of `block` calls, A B B A, `rounds` times.

    sample: (call, index of the input) -> a time. Fewer rounds only where `max_s` seconds are over, ROUNDS at least.
    """
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for done in range(rounds):
        if done >= ROUNDS and time.perf_counter() - start > max_s:
            break
        for call, kept in ((a, times[0]), (b, times[1]), (b, times[1]), (a, times[0])):
            kept += [sample(call, index) for index in range(block)]
    return times


def pairs(a: list[float], b: list[float], block: int) -> list[Pair]:
    """One pair a round, of what `interleave` returned: the geometric mean of the medians of the two blocks."""
    sides = [np.median(np.array(times).reshape(-1, 2, block), axis=2) for times in (a, b)]
    first, second = (np.sqrt(medians.prod(axis=1)).tolist() for medians in sides)
    return list(zip(first, second, strict=True))


def check_pair(a: subject.Subject, b: subject.Subject) -> None:
    """Raise UserError where the two cannot live in one process, which has some settings only once."""
    from pi0exp import build

    wide: list[dict[str, Any]] = [dict(one.environment()) for one in (a, b)]
    for found, one in zip(wide, (a, b), strict=True):
        if isinstance(stack := getattr(one, "stack", None), config.Stack):  # some subjects have none
            found |= build.process_wide(stack)
    if differing := sorted(name for name in {*wide[0], *wide[1]} if wide[0].get(name) != wide[1].get(name)):
        raise UserError(
            f"A and B differ in what holds for a whole process ({', '.join(differing)}) and cannot take turns in one:"
            " measure them apart, and compare without --rerun"
        )


def measure_pair(plain: dict[str, Any], folder: Path | None = None) -> Result:
    """Build both, verify both, let them take turns, on a GPU prove both, verify both again. The first that fails is the
    outcome.

    No files are left in `folder`.
    """
    import torch

    from pi0exp.gpu_time import gpu_time
    from pi0exp.passes import gpu_sensors, state, told
    from pi0exp.proof import unproven
    from pi0exp.timing import device_sample_ms, quiet, summary, warm_up

    experiments = [config.section(plain, side) for side in ("a", "b")]
    rounds = plain.get("rounds", DEFAULT_ROUNDS)
    if not isinstance(rounds, int) or rounds < ROUNDS:
        raise UserError(f"rounds is {rounds!r}; an interval needs {ROUNDS} or more")
    settings = config.measure(experiments[0])
    things = [subject.subject(one) for one in experiments]
    check_pair(*things)
    set_environment(things[0].environment())
    machine, lacking = target_machine(settings.device)
    common: dict[str, Any] = {"numerics": things[1].numerics.name, "fingerprint": fingerprint(machine)}
    unmet = [f"{side}: {reason}" for side, one in zip("AB", things, strict=True) for reason in one.unmet(machine)]
    if reasons := lacking + unmet:
        return Result(Outcome.UNSUPPORTED, reasons, **common)
    device = torch.device("cuda", 0) if machine.has_gpu else torch.device("cpu")

    instances: list[subject.Instance] = []
    metrics: dict[str, float]
    for side, thing in zip("AB", things, strict=True):
        instance = thing.build(device, settings.inputs, lambda text, side=side: progress(f"{side}: {text}"))  # type: ignore[misc]
        if instance.verdict.wrong:
            reasons = [f"{side}: {reason}" for reason in instance.verdict.wrong]
            name = "{}" if side == "B" else f"{BASELINE}/{{}}"
            metrics = {name.format(metric): value for metric, value in instance.verdict.metrics.items()}
            return Result(Outcome.WRONG_NUMERICS, reasons, metrics=metrics, **common)
        instances.append(instance)
    a, b = instances

    warm = {}
    for side, instance in zip("AB", instances, strict=True):
        progress(f"{side}: warm up")
        warm[side] = warm_up(instance.call, device, settings)
    progress(f"A B B A, {rounds} rounds of {settings.inputs} calls a block")
    sensors, facts = gpu_sensors(device)
    before = None if sensors is None else state(sensors)
    with quiet():
        times = interleave(
            a.call,
            b.call,
            lambda call, index: device_sample_ms(call, index, device),
            rounds,
            settings.inputs,
            settings.samples_max_s,
        )
    metrics = {}
    if sensors is not None and before is not None:
        metrics, facts = told(before, state(sensors))
    if machine.has_gpu:
        metrics["memory_mb/peak"] = torch.cuda.max_memory_allocated(device) / 2**20
        for side, thing, instance in zip("AB", things, instances, strict=True):
            progress(f"{side}: profile")
            if reasons := unproven(thing.proofs(), gpu_time(instance, settings, None, None).names):
                return Result(Outcome.UNPROVEN, [f"{side}: {reason}" for reason in reasons], **common)

    progress("verify again")
    for side, instance in zip("AB", instances, strict=True):
        if wrong := instance.recheck():
            reasons = [f"{side}: after it was timed: {reason}" for reason in wrong]
            return Result(Outcome.WRONG_NUMERICS, reasons, **common)

    own, beside = (
        instance.verdict.metrics | warm[side] | summary(taken)
        for side, instance, taken in (("B", b, times[1]), ("A", a, times[0]))
    )
    metrics |= own | {f"{BASELINE}/{name}": value for name, value in beside.items()}
    return Result(
        Outcome.OK,
        metrics=metrics | {"rounds/calls_a_block": float(settings.inputs)},
        samples={"latency_ms": times[1], f"{BASELINE}_latency_ms": times[0]},
        applied=b.applied | {f"{BASELINE}.{group}": lines for group, lines in a.applied.items()},
        facts=b.facts | facts,
        **common,
    )


def settings_of(pair: dict[str, Any]) -> config.MeasureConfig:
    """Those of A hold for both."""
    return config.measure(config.section(pair, "a"))


def measure_pair_isolated(
    a: dict[str, Any], b: dict[str, Any], rounds: int, told: Callable[[str], None]
) -> tuple[Result, list[Pair]]:
    """Both experiments in a child; its result, and a pair for each round, none where it is not ok.

    It takes A's measure settings. Raises UserError where the two cannot live in one process.
    """
    things = [subject.subject(one) for one in (a, b)]
    check_pair(*things)
    for thing in things:
        thing.preflight()
    settings = config.measure(a)
    machine, _ = target_machine(settings.device)
    pair = {"a": a, "b": b, "rounds": rounds}
    result = measure_isolated(pair, 2 * settings.timeout_s, told, module=NAME, on_gpu=machine.has_gpu)
    # What the child took is of both; beside the metrics of B it would look like B's.
    result = replace(result, metrics={name: v for name, v in result.metrics.items() if not name.startswith("wall_s/")})
    if result.outcome is not Outcome.OK:
        return replace(result, fingerprint=result.fingerprint or fingerprint(machine)), []
    samples = result.samples
    return result, pairs(samples[f"{BASELINE}_latency_ms"], samples["latency_ms"], settings.inputs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], measure_pair, __doc__, NAME, settings_of))
