"""Measure one point in a process of its own:  python -m pi0exp.measure EXPERIMENT.json RESULT.json

A plain command, so that a profiler can be put in front of it. EXPERIMENT.json is the composed configuration as the
parent writes it (artifact `experiment.json` of every run); RESULT.json receives a `Result`.
"""

import json
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from pi0exp import config, subject
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.machine import Machine, commit, set_environment, this_machine
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


def fingerprint(machine: Machine) -> dict[str, Any]:
    """What a reader of the numbers may ask about the machine, the code and the day."""
    head, dirty = commit()
    code = {"commit": head, "dirty": dirty, "date": datetime.now(UTC).date().isoformat()}
    return {**machine.identity(), "cpu": machine.cpu, "cores": machine.cores, **code}


def measure(plain: dict[str, Any]) -> Result:
    """Build, verify, time, profile. Nothing is timed that was not verified, and each pass has the device for itself."""
    import torch

    from pi0exp.ceilings import burst_ceilings
    from pi0exp.proof import profiled_names, unproven
    from pi0exp.roofline import floor_ms
    from pi0exp.timing import device_sample_ms, measure_samples, summary, wall_sample_ms, warm_up

    settings, thing = config.measure(plain), subject.subject(plain)
    set_environment(thing.environment())
    machine, reasons = target_machine(settings.device)
    prints, numerics = fingerprint(machine), thing.numerics.name
    if reasons := reasons + thing.unmet(machine):
        return Result(Outcome.UNSUPPORTED, reasons, numerics=numerics, fingerprint=prints)
    if machine.has_gpu and not torch.cuda.is_available():
        reason = f"there is a {machine.gpu}, but torch {torch.__version__} cannot use it (driver {machine.driver})"
        return Result(Outcome.UNSUPPORTED, [reason], numerics=numerics, fingerprint=prints)
    prints |= {"cuda": torch.version.cuda or "", "hip": torch.version.hip or ""}
    device = torch.device("cuda", 0) if machine.has_gpu else torch.device("cpu")
    metrics: dict[str, float] = {}

    ceilings = None
    if machine.has_gpu:
        progress("ceilings: copy and matrix product")
        ceilings = burst_ceilings(thing.matrix_dtype(), device, settings.ceilings_s)
        metrics |= {
            "ceilings/copy_tb_per_s": ceilings.bytes_per_s / 1e12,
            "ceilings/matrix_tflop_per_s": ceilings.flops_per_s / 1e12,
        }
        torch.cuda.empty_cache()

    instance = thing.build(device, settings.inputs, progress)
    common: dict[str, Any] = {
        "numerics": numerics,
        "applied": instance.applied,
        "facts": instance.facts,
        "fingerprint": prints,
    }
    metrics |= instance.verdict.metrics
    if instance.verdict.wrong:
        return Result(Outcome.WRONG_NUMERICS, instance.verdict.wrong, metrics=metrics, **common)
    if machine.has_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    progress("warm up")
    metrics |= warm_up(instance.call, device, settings)
    samples = measure_samples(
        lambda i: device_sample_ms(instance.call, i, device),
        settings.samples,
        settings.samples_max_s,
        progress,
        "measure",
    )
    host = measure_samples(
        lambda i: wall_sample_ms(instance.call_host, i),
        settings.host_samples,
        settings.samples_max_s,
        progress,
        "measure host to host",
    )
    if machine.has_gpu:
        metrics["memory_mb/peak"] = torch.cuda.max_memory_allocated(device) / 2**20
        progress("profile")
        names = profiled_names(instance.call, settings.profile_calls)
        if reasons := unproven(thing.proofs(), names):
            return Result(Outcome.UNPROVEN, reasons, metrics=metrics, **common)

    timed = summary(samples)
    timed |= {
        "latency_host_ms/p50": median(host),
        "throughput_hz": 1e3 * instance.samples_per_call / timed["latency_ms/p50"],
    }
    metrics |= {f"startup_s/{name}": seconds for name, seconds in instance.startup_s.items()} | instance.counters()
    if ceilings is not None:
        stages = floor_ms(thing.work(), ceilings)
        floor = sum(stages.values())
        metrics |= {"roofline/floor_ms": floor} | {f"roofline/floor_ms_{name}": value for name, value in stages.items()}
        if timed["latency_ms/p50"] < floor:
            reason = f"latency {timed['latency_ms/p50']:.3f} ms is below the floor of {floor:.3f} ms: a wrong benchmark"
            return Result(Outcome.ERROR, [reason], metrics=metrics, **common)
        timed["roofline/share"] = floor / timed["latency_ms/p50"]
    return Result(
        Outcome.OK,
        metrics=metrics | timed,
        samples={"latency_ms": samples, "latency_host_ms": host},
        files=instance.attachments(),
        **common,
    )


def guarded(plain: dict[str, Any]) -> Result:
    """`measure`, where running out of memory and errors are results too (the parent adds machine and numerics)."""
    import torch

    try:
        return measure(plain)
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
        return Result(Outcome.ERROR, [reason])


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or {"-h", "--help"} & set(arguments):
        print(__doc__.strip(), file=sys.stderr)
        return CONFIG_ERROR
    source, target = map(Path, arguments)
    try:
        plain = json.loads(source.read_text())
        if not isinstance(plain, dict):
            raise UserError(f"{source}: no composed configuration, which is a JSON object")
        result = guarded(plain)
        part = target.with_suffix(".part")
        part.write_text(json.dumps(result.to_dict()))
        os.replace(part, target)  # whole or not at all
    except (OSError, ValueError) as error:  # among them what JSON cannot read, and UserError
        print(f"pi0exp.measure: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    return result.outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
