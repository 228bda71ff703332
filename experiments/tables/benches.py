"""Tables of what `python -m pi0exp.kernels.bench --json` wrote."""

import json
from typing import Any

from pi0exp import compose
from pi0exp.experiments.tables.points import NONE_YET, machine_line, markdown

TIMES = compose.PACKAGE / "experiments" / "times"
"""Not among the results: those are points, and whoever reads them refuses other files."""
KERNEL, KERNEL_NUMBERS = ("kernel", "case"), ("us", "of ceiling", "eager takes", "compiled takes", "libraries take")
OWN = ("op", "eager", "compile")
"""Contestants with a column of their own; all others are libraries."""


def kernels(name: str) -> str:
    """A row a case of experiments/times/<name>.json: microseconds, and how many times longer others take."""
    if (found := read(name)) is None:
        return NONE_YET
    ceilings = found["ceilings"]
    rates = f"copy {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, products {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s"
    rounds = found["settings"]["rounds"]
    return (
        f"{machine_line([found['fingerprint']])}; medians of {rounds} rounds; {rates}.\n\n"
        f"{markdown(KERNEL, KERNEL_NUMBERS, [_row(row, ceilings) for row in found['rows']])}"
    )


def read(name: str) -> Any:
    """The content of a file, None if there is none yet."""
    file = TIMES / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _row(row: dict[str, Any], ceilings: dict[str, float]) -> list[str]:
    states = {one["name"]: one["state"] for one in row["contestants"]}
    cells, us = [row["kernel"], row["case"]], row["us"]["op"]
    if us is None:
        return [*cells, states["op"], "-", "-", "-", row["contestants"][0]["reason"]]
    least_us = 1e6 * max(row["bytes_moved"] / ceilings["bytes_per_s"], row["flops"] / ceilings["flops_per_s"])

    def takes(name: str) -> str:
        if name not in states:
            return "-"
        return states[name] if row["us"][name] is None else f"{row['us'][name] / us:.2f} x"

    libraries = ", ".join(f"{name} {takes(name)}" for name in states if name not in OWN)
    return [*cells, f"{us:.2f}", f"{100 * least_us / us:.0f} %", takes("eager"), takes("compile"), libraries or "-"]
