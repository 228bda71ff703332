"""Tables of what `python -m pi0exp.kernels.bench --json` and `experiments/resolution.py` wrote."""

import json
from statistics import median
from typing import Any

from pi0exp import compose
from pi0exp.experiments.tables.points import NONE_YET, machine_line, markdown

TIMES = compose.PACKAGE / "experiments" / "times"
"""Not among the results: those are points, and whoever reads them refuses other files."""
KERNEL, KERNEL_NUMBERS = ("kernel", "case"), ("us", "of ceiling", "eager takes", "compiled takes", "libraries take")
RESOLUTION, RESOLUTION_NUMBERS = ("A against",), ("A ms", "pairs", "no difference", "B slower", "B faster", "ratios")
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


def resolution(name: str) -> str:
    """A row a kind of comparison in experiments/times/<name>.json: how often what was found, and between which ratios.

    A rate has the one-sided 95 % limit behind it.
    """
    if (found := read(name)) is None:
        return NONE_YET
    settings, same, planted = (found[part] for part in ("settings", "same", "planted"))
    kinds = {"itself": "same", f"itself + {100 * planted.get('share', 0):g} %": "planted"}
    rows = []
    for title, kind in kinds.items():
        if not (ones := [one for one in found["comparisons"] if one["kind"] == kind]):
            continue
        verdicts, ratios = [one["verdict"] for one in ones], [one["ratio"] for one in ones]
        counts = [str(verdicts.count(word)) for word in ("no difference seen", "slower", "faster")]
        a_ms = median(value for one in ones for value in one["a_ms"])
        rows.append([title, f"{a_ms:.2f}", str(len(ones)), *counts, f"{min(ratios):.4f} to {max(ratios):.4f}"])
    limits = []
    if "rate_at_most" in same:
        limits.append(f"false alarms {100 * same['rate']:.0f} % (at most {100 * same['rate_at_most']:.0f} %)")
    if "rate_at_least" in planted:
        limits.append(f"found {100 * planted['rate']:.0f} % (at least {100 * planted['rate_at_least']:.0f} %)")
    doubts = "".join(f" {name}: {text}." for name, text in found.get("facts", {}).items())
    head = f"{machine_line([found['fingerprint']])}; `{' '.join(found['words'])}`; {settings['rounds']} rounds A B B A"
    rule = f"margin {100 * settings['margin']:g} %, intervals of {100 * settings['confidence']:g} %"
    head += (
        f" of {settings['calls_a_block']} calls a block, {rule}. Rates with 95 % limits: {', '.join(limits)}.{doubts}"
    )
    return f"{head}\n\n{markdown(RESOLUTION, RESOLUTION_NUMBERS, rows)}"


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
