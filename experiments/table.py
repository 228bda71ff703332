"""The Markdown table of a study's committed results:  python experiments/table.py STUDY [--write FILE]

With --write, the text between `<!-- table STUDY -->` and `<!-- end -->` in FILE is replaced by it, and between
`<!-- card STUDY/KEY -->` and `<!-- end -->` by that point's card, so that no figure is ever typed by hand.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pi0exp.card import card
from pi0exp.load import read_record
from pi0exp.track import Record

PLAIN = {"attention": "eager", "gemm": "blas", "fusion": "none", "image_masking": "keep", "precision": "bf16"}
PLAIN |= {"graphs": "none", "compile_mode": "none"}
COLUMNS = (
    "model",
    "workload",
    "options",
    "p50 ms",
    "p90 ms",
    "host p50 ms",
    "Hz",
    "of roofline",
    "error (plain bf16's)",
)


def options(params: dict[str, str]) -> str:
    special = [
        f"{name}={value}" for name, value in params.items() if PLAIN.get(name.split(".")[0]) not in (None, value)
    ]
    return f"`{' '.join(special)}`" if special else "none: plain PyTorch"


def row(record: Record) -> list[str]:
    params, metrics = record["params"], record["metrics"]
    if record["outcome"] != "ok":
        return [params["model"], params["workload"], options(params), *[record["outcome"]] * (len(COLUMNS) - 3)]
    share = f"{100 * metrics['roofline/share']:.0f} %" if "roofline/share" in metrics else "-"
    own = next((value for name, value in metrics.items() if name.startswith("error/rel_l2_plain_")), float("nan"))
    numbers = [f"{metrics[name]:.2f}" for name in ("latency_ms/p50", "latency_ms/p90", "latency_host_ms/p50")]
    error = f"{metrics['error/rel_l2']:.1e} ({own:.1e})"
    return [
        params["model"],
        params["workload"],
        options(params),
        *numbers,
        f"{metrics['throughput_hz']:.1f}",
        share,
        error,
    ]


def order(record: Record) -> tuple[Any, ...]:
    return record["params"]["model"], record["params"]["workload"], -record["metrics"].get("latency_ms/p50", 0.0)


def results(study: str) -> list[Path]:
    files = sorted((ROOT / "experiments" / "results" / study).rglob("*.json*"))
    if not files:
        raise SystemExit(f"no results in experiments/results/{study}")
    return files


def point_card(study: str, key: str) -> str:
    """What the run printed, indented as a block of text."""
    file = next((file for file in results(study) if file.name.startswith(f"{key}.")), None)
    if file is None:
        raise SystemExit(f"no result {key} in experiments/results/{study}")
    return "\n" + textwrap.indent(card(read_record(file), "(its id)", settled=False), "    ") + "\n\n"


def table(study: str) -> str:
    """One line of text a machine, then its points, slowest first."""
    files = results(study)
    parts = []
    for folder in sorted({file.parent for file in files}):
        records = sorted((read_record(file) for file in files if file.parent == folder), key=order)
        prints = records[0]["fingerprint"]
        commits = ", ".join(sorted({record["fingerprint"]["commit"][:10] for record in records}))
        days = ", ".join(sorted({record["fingerprint"]["date"] for record in records}))
        samples = max(len(record["samples"].get("latency_ms", [])) for record in records)
        parts.append(
            f"{prints['gpu']}, driver {prints['driver'] or '-'}, torch {prints['versions']['torch']}, {days}, commit"
            f" {commits}; {samples} calls back to back.\n"
        )
        lines = [list(COLUMNS), ["---"] * 3 + ["---:"] * (len(COLUMNS) - 3), *map(row, records)]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    return "\n".join(parts)


def written(text: str, study: str) -> str:
    """`text` with its table of `study`, and the cards of its points, replaced."""
    if f"<!-- table {study} -->\n" not in text:
        raise SystemExit(f"there is no line <!-- table {study} --> to write the table behind")

    def made(match: re.Match[str]) -> str:
        block = table(study) if match["kind"] == "table" else point_card(study, match["key"])
        return f"{match['start']}{block}<!-- end -->"

    block = rf"(?P<start><!-- (?P<kind>table|card) {study}(/(?P<key>\w+))? -->\n).*?<!-- end -->"
    return re.sub(block, made, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--write", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.write is None:
        print(table(given.study))
    else:
        given.write.write_text(written(given.write.read_text(), given.study))


if __name__ == "__main__":
    main()
