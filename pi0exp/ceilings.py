"""What this GPU reaches on a large copy and on large matrix products: in short bursts from a rested clock, and for
long.

    python -m pi0exp.ceilings [--show] [--json]

measures all rates of this machine and keeps them; runs take what they need from there, for a week.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch

from pi0exp import pipes
from pi0exp.ceilings_file import CeilingsFile, Rate, fresh
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.gpu_lock import taken_here
from pi0exp.machine import Machine, this_machine
from pi0exp.rates import COPY, best_seconds, measure_all, measure_rate, work_of
from pi0exp.result import CONFIG_ERROR, Outcome
from pi0exp.roofline import Ceilings, Rooflines
from pi0exp.sensors import SensorError, open_sensors


@dataclass(frozen=True)
class Reached:
    """The ceilings for one kind of product, in words when they were measured, and whether any was before this run."""

    roofs: Rooflines
    when: str
    reused: bool

    def metrics(self) -> dict[str, float]:
        burst, sustained = self.roofs.burst, self.roofs.sustained
        return {
            "ceilings/copy_tb_per_s": burst.bytes_per_s / 1e12,
            "ceilings/matrix_tflop_per_s": burst.flops_per_s / 1e12,
            "ceilings/copy_sustained_tb_per_s": sustained.bytes_per_s / 1e12,
            "ceilings/matrix_sustained_tflop_per_s": sustained.flops_per_s / 1e12,
        }


def reached(
    kind: str, device: torch.device, seconds: float, reuse: bool, file: CeilingsFile, owner: dict[str, Any]
) -> Reached:
    """The ceilings of copies and of products of that kind: kept ones if they may be reused and are fresh, else measured
    now and kept. seconds: of bursts, half of it for each of the two. owner: `owner_of` this machine.

    Where they cannot be kept, `when` says why.
    """
    known = file.rates(owner) if reuse else {}
    found = {name: rate for name in (COPY, kind) if (rate := known.get(name)) is not None and fresh(rate)}
    missing = {name: measure_rate(name, device, seconds / 2) for name in (COPY, kind) if name not in found}
    when = measured_when(*(found[name].at if name in found else "" for name in (COPY, kind)))
    if missing:
        try:
            file.keep(owner, missing)
        except OSError as error:
            when += f", not kept: {error}"
    both = found | missing
    burst = Ceilings(both[COPY].burst, both[kind].burst)
    return Reached(Rooflines(burst, Ceilings(both[COPY].sustained, both[kind].sustained)), when, reused=bool(found))


def measured_when(copies: str, products: str) -> str:
    """In words, of two times, "" for now. Two of one day are of one measurement: the earlier stands for both."""
    if copies[:10] == products[:10]:
        return f"of {min(copies, products)}" if copies else "measured in this run"
    said = (f"of {time}" if time else "measured in this run" for time in (copies, products))
    return "copies {}, products {}".format(*said)


def owner_of(machine: Machine, device: torch.device) -> dict[str, Any]:
    """What the rates belong to: this very GPU with its power limit, its driver, and the libraries that multiply."""
    identity = machine.identity()
    owner = {name: identity[name] for name in ("gpu", "vendor", "arch", "memory_mb", "driver")}
    try:
        limit_w: float | None = open_sensors(device).power_limit_w()
    except SensorError:
        limit_w = None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return owner | {"torch": machine.versions.get("torch", ""), "uuid": uuid, "power_limit_w": limit_w}


def burst_ceilings(dtype: torch.dtype, device: torch.device, seconds: float) -> Ceilings:
    """The best of as many bursts as fit into `seconds`, half of them copies, half products of 8192 x 8192 matrices.

    Bursts, not a sustained run: this is the limit that no call may pass, not the rate a power cap allows for long.
    """
    kind = {torch.bfloat16: "bf16", torch.float32: "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"}[dtype]
    rates = []
    for name in (COPY, kind):
        with work_of(name, device) as (call, amount, calls):
            rates.append(amount / best_seconds(call, device, seconds / 2, calls))
    return Ceilings(bytes_per_s=rates[0], flops_per_s=rates[1])


def table(rates: dict[str, Rate]) -> str:
    """One line a rate: TB/s of the copy, TFLOP/s of products."""
    lines = [f"{'rate':>6}  {'burst':>8}  {'sustained':>9}  {'unit':<8}  measured"]
    for name, rate in rates.items():
        unit = "TB/s" if name == COPY else "TFLOP/s"
        digits = 2 if name == COPY else 0
        lines.append(
            f"{name:>6}  {rate.burst / 1e12:>8.{digits}f}  {rate.sustained / 1e12:>9.{digits}f}  {unit:<8}  {rate.at}"
        )
    return "\n".join(lines)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.ceilings",
        description="Measure what this GPU reaches on a large copy and on matrix products, and keep it for the runs to"
        " come.",
        epilog="example: python -m pi0exp.ceilings --show --json\n\n"
        "exit codes: 0; 2 for a file that cannot be read or written, or nothing to show; 3 without a GPU",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--show", action="store_true", help="what is kept for this machine; measures nothing")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--seconds", type=float, default=1.0, help="of bursts, for each rate (1.0)")
    given = parser.parse_args(arguments)
    try:
        if given.seconds < 0:
            raise UserError(f"--seconds is {given.seconds}; it must not be negative")
        machine, file = this_machine(), CeilingsFile.default()
        device = torch.device("cuda", 0)
        with taken_here(not given.show, tell):
            if not machine.has_gpu or not torch.cuda.is_available():
                raise UnsupportedError(
                    f"there is no GPU that torch {torch.__version__} can use; a CPU has no ceilings here"
                )
            owner = owner_of(machine, device)
            if given.show:
                if not (rates := file.rates(owner)):
                    raise UserError(f"{file.path} holds no rates of this machine: run python -m pi0exp.ceilings")
            else:
                rates = measure_all(device, given.seconds, tell)
                file.keep(owner, rates)
    except UnsupportedError as error:
        print(f"pi0exp.ceilings: {error}", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    except (UserError, OSError) as error:
        print(f"pi0exp.ceilings: {error}", file=sys.stderr)
        return CONFIG_ERROR
    if given.json:
        print(json.dumps({"machine": owner, "rates": {name: vars(rate) for name, rate in rates.items()}}, indent=2))
    else:
        print(f"{owner['gpu']}, driver {owner['driver']}, torch {owner['torch']}, {file.path}\n{table(rates)}")
    return 0


if __name__ == "__main__":
    pipes.leave(main)
