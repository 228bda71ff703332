"""What a person reads after a run: one compact card, and one table after a sweep."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0exp.config import GROUPS
from pi0exp.title import word

CONSOLE_WIDTH = 100
TABLE_WIDTH = 10_000


def console() -> Console:
    """A terminal's own width; a fixed one where the output goes to a file or pipe."""
    found = Console(highlight=False, soft_wrap=True)
    return found if found.is_terminal else Console(highlight=False, soft_wrap=True, width=CONSOLE_WIDTH)


def show(made: Table) -> None:
    """A table folds on a terminal; in a file or pipe each point is one line."""
    screen = console()
    if screen.is_terminal:
        screen.print(made, markup=False)
        return
    wide = Console(highlight=False, width=TABLE_WIDTH)
    with wide.capture() as text:
        wide.print(made, markup=False)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def card(record: dict[str, Any], run_id: str, settled: bool) -> str:
    """The record of a point as a few lines of text."""
    params, metrics, facts, machine = record["params"], record["metrics"], record["facts"], record["fingerprint"]
    outcome = record["outcome"]
    rows = asked(params)
    short = {name: value for name, value in facts.items() if name not in ROWS}
    rows += [("facts", ", ".join(f"{name} {value}" for name, value in short.items()))] if short else []
    rows += [("machine", machine_line(machine))]
    if outcome == "ok":
        rows += [("latency", _latency(metrics)), *measured_rows(metrics)]
        if "gpu/launches" in metrics:
            rows.append(("GPU time", _gpu_time(metrics)))
    if "error/rel_l2" in metrics:
        rows.append(("error", _error(record)))
    rows += [(title, facts[name]) for name, title in ROWS.items() if name in facts]
    rows.append(("outcome", outcome + (" (already measured; resume=false measures again)" if settled else "")))
    rows += [("", reason) for reason in record["reasons"]]
    rows.append(("MLflow run", f"{run_id}  study {record['study']}"))
    return aligned(rows)


ROWS = {
    "warm_up": "warm-up",
    "median": "median",
    "clocks": "clocks",
    "clocks_loaded": "under load",
    "processes": "others on GPU",
    "power": "power from",
    "ceilings": "ceilings",
}
"""Facts that stand in a row of their own, since they qualify the numbers: name -> title."""


def measured_rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """One row for each pass beside the latency, as far as there is one; records of earlier versions have fewer."""
    rows = []
    if "latency_ms/p50_low" in metrics:
        low, high = metrics["latency_ms/p50_low"], metrics["latency_ms/p50_high"]
        rows.append(("", f"p50 within {low:.2f} to {high:.2f} ms at 95 %, {metrics['sampling/count']:.0f} calls"))
    rows.append(("host to host", f"p50 {metrics['latency_host_ms/p50']:.2f} ms"))
    if "latency_paced_ms/p50" in metrics:
        p50, p99 = metrics["latency_paced_ms/p50"], metrics["latency_paced_ms/p99"]
        late = metrics["latency_paced_ms/late_share"]
        tail = f", {100 * late:.0f} % of the calls began late" if late else ""
        rows.append(("paced", f"p50 {p50:.2f} ms, p99 {p99:.2f} ms{tail}"))
    stages = {name.removeprefix("stage_ms/"): value for name, value in metrics.items() if name.startswith("stage_ms/")}
    if stages:
        rows.append(("stages", ", ".join(f"{name} {value:.2f} ms" for name, value in stages.items())))
    if "roofline/share" in metrics:
        rows.append(("roofline", _roofline(metrics)))
    if "energy_j/call" in metrics:
        rows.append(("power", _power(metrics)))
    return rows


def _roofline(metrics: dict[str, float]) -> str:
    text = f"floor {metrics['roofline/floor_ms']:.2f} ms, {100 * metrics['roofline/share']:.0f} % of it reached"
    if "roofline/share_sustained" in metrics:
        floor, share = metrics["roofline/floor_sustained_ms"], metrics["roofline/share_sustained"]
        text += f"; sustained {floor:.2f} ms, {100 * share:.0f} %"
    return text


def _power(metrics: dict[str, float]) -> str:
    text = f"mean {metrics['power_w/mean']:.0f} W"
    text += f" of {metrics['power_w/limit']:.0f} W allowed" if "power_w/limit" in metrics else ""
    text += f", {metrics['energy_j/call']:.2f} J a call"
    text += f" +- {metrics['energy_j/uncertainty']:.2f}" if "energy_j/uncertainty" in metrics else ""
    return f"{text}, {metrics['perf_per_watt']:.3f} calls/s/W"


def aligned(rows: list[tuple[str, str]]) -> str:
    """Lines of a name and a text; rows without a name go on with the one above."""
    return "\n".join(f"{name:>13}  {text}" for name, text in rows)


def asked(params: dict[str, str]) -> list[tuple[str, str]]:
    """What a point is: one row for its stack, then one for each of its other sections."""
    stack = {name: value for name, value in params.items() if name.split(".")[0] in (*GROUPS, "stack")}
    rows = [("stack", " ".join(word(name, value) for name, value in stack.items()))]
    return rows + _sections({name: value for name, value in params.items() if name not in stack})


def _sections(params: dict[str, str]) -> list[tuple[str, str]]:
    """One row a section: the option's name, then its settings."""
    rows: dict[str, list[str]] = {}
    for name, value in params.items():
        section, _, setting = name.partition(".")
        rows.setdefault(section, []).append(f"{setting} {value}".strip())
    return [(section, ", ".join(words)) for section, words in rows.items()]


def machine_line(machine: dict[str, Any]) -> str:
    """GPU and torch of a fingerprint, and the processor where it computes."""
    text = f"{machine['gpu']}, torch {machine['versions'].get('torch', '?')}"
    return text if machine["vendor"] != "cpu" else f"{text}, {machine['cores']} cores of {machine['cpu']}"


def _latency(metrics: dict[str, float]) -> str:
    p50, p90 = metrics["latency_ms/p50"], metrics["latency_ms/p90"]
    return f"p50 {p50:.2f} ms, p90 {p90:.2f} ms, {metrics['throughput_hz']:.1f} Hz"


def _gpu_time(metrics: dict[str, float]) -> str:
    """Categories that are not 0 %, the largest first."""
    shares = {name.split("/")[1]: value for name, value in metrics.items() if name.startswith("kernels_share/")}
    largest = sorted((name for name in shares if shares[name] >= 0.005), key=lambda name: -shares[name])
    words = [f"{name} {100 * shares[name]:.0f} %" for name in largest]
    idle = f"; idle {100 * metrics['gpu/idle_share']:.0f} % under the profiler" if "gpu/idle_share" in metrics else ""
    return f"{', '.join(words)}; {metrics['gpu/launches']:.0f} launches{idle}"


def _error(record: dict[str, Any]) -> str:
    metrics = record["metrics"]
    plain = {name.removeprefix("error/rel_l2_plain_"): value for name, value in metrics.items() if "_plain_" in name}
    own = ", ".join(f"plain {precision} {value:.2e}" for precision, value in plain.items())
    of = "results" if "subject" in record["params"] else "actions"
    return f"rel L2 {metrics['error/rel_l2']:.2e} of the {of} ({own}), declared {record['numerics']}"


def table(rows: list[dict[str, Any]]) -> Table:
    """The closing table of a sweep: one row a point, the columns that differ between the points."""
    varying = differing(rows)
    made = Table(box=None, pad_edge=False)
    for name in ("#", *varying):
        made.add_column(name, overflow="fold")
    for name in ("p50 ms", "Hz", "error"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("outcome", overflow="fold")
    for i, row in enumerate(rows):
        metrics = row["metrics"]
        cells = [f"{metrics[name]:.{digits}}" if name in metrics else "-" for name, digits in _CELLS]
        outcome = ": ".join([row["outcome"], "; ".join(row["reasons"])]) if row["reasons"] else row["outcome"]
        made.add_row(str(i), *(str(row["params"].get(name, "-")) for name in varying), *cells, outcome)
    return made


def differing(rows: list[dict[str, Any]]) -> list[str]:
    """The parameters in which points differ, in the order in which they first appear."""
    params = [row["params"] for row in rows]
    names = list(dict.fromkeys(name for one in params for name in one))
    found = [name for name in names if len({one[name] for one in params if name in one}) > 1]
    told = {name: "stack" if name.split(".")[0] in GROUPS else name.split(".")[0] for name in found}
    return [name for name in found if told[name] not in found or not _follows(name, told[name], params)]


def _follows(name: str, other: str, params: list[dict[str, str]]) -> bool:
    """Whether another name tells a setting: each value of `other` has one of it."""
    if name == other:
        return False
    return len({(one.get(other), one.get(name)) for one in params}) == len({one.get(other) for one in params})


_CELLS = (("latency_ms/p50", "2f"), ("throughput_hz", "1f"), ("error/rel_l2", "1e"))
