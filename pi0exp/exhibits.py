"""What MLflow shows of a point beside its numbers: tables, a plot of its samples, a note, and tags of the machine.

All of it is made from the record alone, so a committed result that is brought in looks like one that was measured here.
Nothing here knows MLflow but for the names that its pages look for.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pi0exp.title import title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
"""A measured point in the form of pi0exp.result.record."""

TABLES = "tables/"
SAMPLES, KERNELS, CATEGORIES, PRODUCTS = (
    f"{TABLES}{name}.json" for name in ("samples", "kernels", "categories", "gemm")
)
LATENCY = "plots/latency.png"
ROOFLINE = "roofline.svg"
"""The name of the roofline among the files of a record."""
LISTED = "mlflow.loggedArtifacts"
"""The tag by which MLflow knows which files to show as tables."""

_PASSES = {
    "latency_ms": ("on the device", "tab:blue"),
    "latency_host_ms": ("host to host", "tab:orange"),
    "latency_paced_ms": ("at a robot's pace", "tab:green"),
}
PLOTTED = 30
"""Calls from which on a plot shows more than the table. Drawing takes a fifth of a second and matplotlib's import one,
which whoever measures almost nothing, many at a time, need not wait for."""
_DPI = 110


def tables(record: Record) -> dict[str, str]:
    """Path -> a table as `log_table` writes it, which appends to one that is there and so cannot be repeated.

    samples: one column a pass, in ms or W as its name says, empty where a pass has fewer. From the profile: kernels
    (of one call), categories (milliseconds of one call, by stage), gemm (one row a shape of matrix products).
    """
    found: dict[str, tuple[list[str], list[list[Any]]]] = {}
    if passes := {name: values for name, values in record["samples"].items() if values}:
        longest = max(map(len, passes.values()))
        columns = [_short(values) + [None] * (longest - len(values)) for values in passes.values()]
        found[SAMPLES] = ["sample", *passes], [list(row) for row in zip(range(longest), *columns, strict=True)]
    if profile := _profile(record):
        found |= profile
    return {path: json.dumps({"columns": columns, "data": rows}) for path, (columns, rows) in found.items() if rows}


def _short(values: list[float]) -> list[float]:
    """Six digits, for reading; result.json has them all."""
    return [float(f"{value:.6g}") for value in values]


def _profile(record: Record) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Tables of breakdown.json. None where a record has none, or one of another version, which it keeps as a file."""
    try:
        found = json.loads(record.get("files", {})["breakdown.json"])
        stages = {stage: values for stage, values in found["stages"].items() if sum(values.values())}
        kernels = [[row[name] for name in ("name", "category", "count", "ms", "share")] for row in found["kernels"]]
        categories = [
            [name, ms, found["shares"][name], *(values[name] for values in stages.values())]
            for name, ms in found["ms"].items()
            if ms
        ]
        products = [
            [*(row["product"][name] for name in _SHAPE), *(row[name] for name in _RATES)] for row in found["products"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {
        KERNELS: (["kernel", "category", "count", "ms", "share"], kernels),
        CATEGORIES: (["category", "ms", "share", *(f"{stage}_ms" for stage in stages)], categories),
        PRODUCTS: ([*_SHAPE, *_RATES], products),
    }


_SHAPE, _RATES = (
    ("m", "n", "k", "batch", "dtype"),
    ("count", "ms", "tflop_per_s", "of_ceiling", "of_roofline"),
)


def figures(record: Record) -> Iterator[tuple[str, "Figure"]]:
    """Path -> figure; none where fewer than PLOTTED calls were timed."""
    series = {name: record["samples"][name] for name in _PASSES if record["samples"].get(name)}
    if len(series.get("latency_ms", [])) >= PLOTTED:
        yield LATENCY, latency_figure(series, record["metrics"], title(record["params"]))


def latency_figure(series: dict[str, list[float]], metrics: dict[str, float], name: str) -> "Figure":
    """Every call in the order in which they were made, and beside it which share of the calls was at least as fast."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its caches
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=_DPI)
    calls, shares = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for kind, times in series.items():
        label, color = _PASSES[kind]
        calls.plot(times, ".", markersize=3, color=color, label=f"{label}, p50 {metrics.get(f'{kind}/p50', 0):.2f} ms")
        shares.plot([(i + 1) / len(times) for i in range(len(times))], sorted(times), color=color)
    low, high = (metrics.get(f"latency_ms/p50_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        calls.axhspan(low, high, color="tab:blue", alpha=0.25, linewidth=0, label="95 % interval of the median")
    calls.set(xlabel="call", ylabel="ms")
    shares.set(xlabel="share of the calls")
    calls.legend(fontsize="small", loc="upper right")  # the best place takes longer to find than all else to draw
    for axes in (calls, shares):
        axes.grid(True, linewidth=0.3)
    figure.suptitle(name if len(name) <= 110 else f"{name[:109]}…", fontsize="medium")
    figure.subplots_adjust(left=0.08, right=0.98, top=0.9, bottom=0.13, wspace=0.05)
    return figure


def texts(record: Record) -> dict[str, str]:
    """Path -> text of every file of a run that is a text, its record among them."""
    made = {"experiment.json": json.dumps(record["experiment"], indent=2), "result.json": json.dumps(record)}
    if record["log"]:
        made["log.txt"] = record["log"]
    # Records of earlier versions have no files.
    for file, text in record.get("files", {}).items():
        made[f"plots/{file}" if file == ROOFLINE else f"files/{file}"] = text
    return made | tables(record)


def tags(record: Record, files: Iterable[str]) -> dict[str, str]:
    """Of a finished run with these files. MLflow shows the note at the top of the run's page."""
    made = {f"facts.{name}": value for name, value in record["facts"].items()}
    made |= {"reasons": "\n".join(record["reasons"]), "numerics": record["numerics"]}
    made |= {"mlflow.note.content": note(record)} | machine_tags(record["fingerprint"])
    if listed := [{"path": path, "type": "table"} for path in files if path.startswith(TABLES)]:
        made[LISTED] = json.dumps(listed)
    return made


def machine_tags(fingerprint: dict[str, Any]) -> dict[str, str]:
    """What of the machine and the code runs are looked for by; "" is told by no tag."""
    known = {
        name: fingerprint.get(name) for name in ("gpu", "arch", "driver", "cuda", "hip", "commit", "dirty", "date")
    }
    known |= {name: version for name, version in (fingerprint.get("versions") or {}).items() if name in _VERSIONS}
    known["mlflow.source.git.commit"] = fingerprint.get("commit")
    known |= {"mlflow.source.name": "pi0exp", "mlflow.source.type": "LOCAL"}
    return {name: str(value) for name, value in known.items() if value not in (None, "")}


_VERSIONS = ("torch", "triton", "python")


def note(record: Record) -> str:
    """Markdown: the outcome, then every parameter and number."""
    numerics = f", {record['numerics']}" if record["numerics"] else ""
    lines = [f"**{record['outcome']}**{numerics}", *(f"- {reason}" for reason in record["reasons"])]
    metrics = {name: f"{value:.6g}" for name, value in record["metrics"].items()}
    for heading, rows in (("parameter", record["params"]), ("metric", metrics)):
        if rows:
            lines += ["", f"| {heading} | value |", "|---|---|"]
            lines += ["| {} | {} |".format(name, value.replace("|", "\\|")) for name, value in rows.items()]
    return "\n".join(lines)
