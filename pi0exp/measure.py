"""Measure one point in a process of its own:  python -m pi0exp.measure EXPERIMENT.json RESULT.json

A plain command, so that a profiler can be put in front of it. EXPERIMENT.json is the composed configuration as the
parent writes it (artifact `experiment.json` of every run); RESULT.json receives a `Result`, and the folder RESULT.files
beside it what is no text: the profiler's trace.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pi0exp import causes, collection, config, gpu_lock, subject
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.machine import Machine, commit, held_gpu, set_environment, this_machine
from pi0exp.result import CONFIG_ERROR, Outcome, Result

PROGRESS = "[pi0exp] "
"""Starts the lines of the child's output that tell what it is doing; everything else is somebody's log."""


def progress(text: str) -> None:
    print(f"{PROGRESS}{text}", flush=True)


def target_machine(wanted: config.Device) -> tuple[Machine, list[str]]:
    """The machine as far as it takes part in the measurement, and why it cannot."""
    machine = this_machine()
    if wanted is config.Device.cpu:
        return machine.without_gpu(), []
    if wanted is config.Device.gpu and not machine.has_gpu:
        return machine, [f"measure.device=gpu: there is no GPU that torch {machine.versions.get('torch')} can use"]
    return machine, []


def fingerprint(machine: Machine, gpu_uuid: str | None = None) -> dict[str, Any]:
    """What a reader of the numbers may ask about the machine, the code and the day.

    gpu_uuid: which of several equal GPUs it was, where this process was not started for it; no part of the identity.
    """
    head, dirty = commit()
    now = datetime.now(UTC)
    code = {"commit": head, "dirty": dirty, "date": now.date().isoformat(), "time": now.isoformat(timespec="seconds")}
    uuid = (gpu_uuid or held_gpu()) if machine.has_gpu else None
    which = {"gpu_uuid": uuid} if uuid else {}
    return {**machine.identity(), **which, "cpu": machine.cpu, "cores": machine.cores, **code}


def unusable(machine: Machine) -> str:
    """Why torch cannot open the machine's GPU, in its own words; "" where it can.

    They tell a driver too old for this build of torch from a GPU that does not start at the moment.
    """
    import torch

    if torch.cuda.is_available():
        return ""
    text = f"there is a {machine.gpu}, but torch {torch.__version__} cannot use it (driver {machine.driver})"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # the first from a build without CUDA
        return f"{text}: {' '.join(str(error).split())}"
    return text


def measure(plain: dict[str, Any], folder: Path | None = None) -> Result:
    """Build, verify, time, profile. Nothing is timed that was not verified, and each pass has the device for itself.

    folder: for files that are no texts, made if there are any; without it they are not kept.
    """
    import torch

    from pi0exp.ceilings import owner_of, reached
    from pi0exp.ceilings_file import CeilingsFile
    from pi0exp.gpu_time import gpu_time
    from pi0exp.passes import gpu_sensors, timed_passes
    from pi0exp.profiling import NAMES
    from pi0exp.proof import unproven
    from pi0exp.roofline import least_time, shares
    from pi0exp.roofline_plot import roofline_svg
    from pi0exp.slices import Ceilings

    settings, thing = config.measure(plain), subject.subject(plain)
    set_environment(thing.environment())
    machine, reasons = target_machine(settings.device)
    prints, numerics = fingerprint(machine), thing.numerics.name
    if reasons := reasons + thing.unmet(machine):
        return Result(Outcome.UNSUPPORTED, reasons, numerics=numerics, fingerprint=prints)
    if machine.has_gpu and (reason := unusable(machine)):
        # Not `unsupported`, which is settled: what keeps a GPU from being opened is mostly repaired.
        return Result(Outcome.ERROR, [reason], numerics=numerics, fingerprint=prints)
    prints |= {"cuda": torch.version.cuda or "", "hip": torch.version.hip or ""}
    device = torch.device("cuda", 0) if machine.has_gpu else torch.device("cpu")
    metrics: dict[str, float] = {}

    ceilings = None
    if machine.has_gpu:
        progress("ceilings: copy and matrix product")
        rate, file, owner = thing.matrix_rate(), CeilingsFile.default(), owner_of(machine, device)
        ceilings = reached(rate, device, settings.ceilings_s, settings.reuse_ceilings, file, owner)
        torch.cuda.empty_cache()

    instance = thing.build(device, settings.inputs, progress)
    facts = dict(instance.facts)
    common: dict[str, Any] = {
        "numerics": numerics,
        "applied": instance.applied,
        "facts": facts,
        "fingerprint": prints,
    }
    metrics |= instance.verdict.metrics
    if instance.verdict.wrong:
        return Result(Outcome.WRONG_NUMERICS, instance.verdict.wrong, metrics=metrics, **common)
    if machine.has_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    sensors, lacking = gpu_sensors(device)
    passes = timed_passes(instance, device, settings, progress, sensors)
    if isinstance(instance, subject.Detailed):
        own = instance.details(settings, None if ceilings is None else ceilings.roofs.burst, progress)
        passes.timed |= own.metrics
        passes.samples |= own.samples
        passes.facts |= own.facts
    metrics |= passes.metrics
    facts |= lacking | passes.facts
    if machine.has_gpu:
        metrics["memory_mb/peak"] = torch.cuda.max_memory_allocated(device) / 2**20
        progress("profile")
        rates = None
        if ceilings is not None:
            burst = ceilings.roofs.burst
            rates = Ceilings(burst.flops_per_s, burst.bytes_per_s, NAMES[rate])
        gpu = gpu_time(instance, settings, rates, folder)
        if reasons := unproven(thing.proofs(), gpu.names):
            return Result(Outcome.UNPROVEN, reasons, metrics=metrics, **common)

    timed = passes.timed
    timed["throughput_hz"] = 1e3 * instance.samples_per_call / timed["latency_ms/p50"]
    if "energy_j/call" in timed:
        timed["energy_j/sample"] = timed["energy_j/call"] / instance.samples_per_call
    metrics |= {f"startup_s/{name}": seconds for name, seconds in instance.startup_s.items()} | instance.counters()
    files = instance.attachments()
    if machine.has_gpu:
        # Before the shares of the roofline: in one graph for the whole call only the profile tells the stages apart.
        timed |= gpu.metrics(timed["latency_ms/p50"])
        files |= gpu.files()
        facts |= gpu.facts()
    if ceilings is not None and not thing.work():  # nothing that a whole call could be compared with
        metrics |= ceilings.metrics()
        facts["ceilings"] = ceilings.when
    elif ceilings is not None:
        work, of_stack = thing.work(), thing.stack_work()
        # At a robot's pace the clocks are rested: that may be the faster one.
        p50 = min(timed[name] for name in ("latency_ms/p50", "latency_paced_ms/p50") if name in timed)
        least = least_time(work, of_stack, ceilings.roofs)
        if p50 < least["roofline/floor_ms"] and ceilings.reused:
            progress("below the floor: ceilings again")
            ceilings = reached(rate, device, settings.ceilings_s, False, file, owner)
            least = least_time(work, of_stack, ceilings.roofs)
        metrics |= ceilings.metrics() | least
        facts["ceilings"] = ceilings.when
        if p50 < (floor := least["roofline/floor_ms"]):
            reason = f"latency {p50:.3f} ms is below the floor of {floor:.3f} ms: a wrong benchmark"
            return Result(Outcome.ERROR, [reason], metrics=metrics, **common)
        timed |= shares(metrics | timed)
        files |= {"roofline.svg": roofline_svg(work, ceilings.roofs, timed)}
    progress("verify again")
    if wrong := instance.recheck():  # what was right before the first timed call was not all the time
        reasons = [f"after it was timed: {text}" for text in wrong]
        return Result(Outcome.WRONG_NUMERICS, reasons, metrics=metrics, **common)
    return Result(
        Outcome.OK,
        metrics=metrics | timed,
        samples=passes.samples,
        files=files,
        **common,
    )


Body = Callable[[dict[str, Any], Path | None], Result]


def guarded(plain: dict[str, Any], folder: Path | None = None, body: Body = measure) -> Result:
    """`measure`, where running out of memory and errors are results too (the parent adds machine and numerics)."""
    import torch

    try:
        return body(plain, folder)
    except torch.OutOfMemoryError as error:
        reason = (str(error).splitlines() or ["the device ran out of memory"])[0]
        return Result(Outcome.OOM, [reason])
    except MemoryError:
        return Result(Outcome.OOM, ["the host ran out of memory"])
    except UserError:
        raise
    except UnsupportedError as error:  # of an option that can tell only once it sees the model or an input
        return Result(Outcome.UNSUPPORTED, [" ".join(str(error).split())])
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        return Result(Outcome.OOM if causes.is_memory(str(error)) else Outcome.ERROR, [reason])


def main(
    arguments: list[str],
    body: Body = measure,
    usage: str = __doc__,
    name: str = "pi0exp.measure",
    settings: Callable[[dict[str, Any]], config.MeasureConfig] = config.measure,
) -> int:
    """The command: read EXPERIMENT.json, write RESULT.json, return the exit code.

    Others give a body of their own, and say where the measure settings of their input are.
    """
    if {"-h", "--help"} & set(arguments):
        print(usage.strip())
        return 0
    if len(arguments) != 2:
        print(usage.strip(), file=sys.stderr)
        return CONFIG_ERROR
    source, target = map(Path, arguments)
    try:
        plain = json.loads(source.read_text())
        if not isinstance(plain, dict):
            raise UserError(f"{source}: no composed configuration, which is a JSON object")
        machine, _ = target_machine(settings(plain).device)
        with gpu_lock.taken_here(machine.has_gpu, progress):  # by the parent already, unless this was started by hand
            result = guarded(plain, target.with_suffix(".files"), body)
        part = target.with_suffix(".part")
        part.write_text(json.dumps(result.to_dict()))
        os.replace(part, target)  # whole or not at all
    except (OSError, ValueError) as error:  # among them what JSON cannot read, and UserError
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    return result.outcome.exit_code


if __name__ == "__main__":
    collection.skip_at_exit()
    sys.exit(main(sys.argv[1:]))
