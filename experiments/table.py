"""Tables of the READMEs:  python experiments/table.py --write README.md experiments/README.md

In each FILE the text between `<!-- KIND NAME -->` and `<!-- end -->` is replaced, so that no figure and no list of
options is ever typed by hand:

    table STUDY         the points of experiments/results/STUDY, with latencies
    checks STUDY        the same without, for points that shared a GPU while they were measured
    card STUDY/KEY      the card of one point
    kernels FILE        experiments/times/FILE.json, which `python -m pi0exp.kernels.bench --json` writes
    resolution FILE     the same, which `python experiments/resolution.py` writes
    attention FILE      the same, which `python experiments/sweeps/attention.py` writes; gemm and norms alike
    chain FILE          the same, which `python experiments/skinny_chain.py` writes
    conf TABLE          what conf/ holds: options, stacks, inputs, switches
    answers all         every study: question, last answer, date, and where its table is
    plot STUDY          docs/STUDY.svg, which `python -m pi0exp.report --write` makes, and the answer
    findings STUDIES    the answers of some studies, A,B,C

`python experiments/table.py KIND NAME` prints one.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pi0exp.experiments.tables import answers, benches, conf, points, sweeps

CONF = {"options": conf.options, "stacks": conf.stacks, "inputs": conf.inputs, "switches": conf.switches}
KINDS: dict[str, Callable[[str], str]] = {
    "table": points.times,
    "checks": points.checks,
    "card": points.point_card,
    "kernels": benches.kernels,
    "resolution": benches.resolution,
    "attention": sweeps.attention,
    "gemm": sweeps.gemm,
    "norms": sweeps.norms,
    "chain": sweeps.chain,
    "conf": lambda name: CONF[name](),
    "answers": answers.answers,
    "plot": answers.plot,
    "findings": answers.findings,
}
BLOCK = re.compile(r"(?P<start><!-- (?P<kind>\w+) (?P<name>\S+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def made(kind: str, name: str) -> str:
    """The text of a block. SystemExit for a kind or a table that is not there."""
    if kind not in KINDS or (kind == "conf" and name not in CONF):
        raise SystemExit(f"no block {kind} {name}: there are {', '.join(KINDS)}, and of conf {', '.join(CONF)}")
    return KINDS[kind](name)


def written(text: str) -> str:
    """`text` with every block made anew."""
    return BLOCK.sub(lambda match: match["start"] + made(match["kind"], match["name"]) + match["end"], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", nargs="*", metavar="KIND NAME")
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="FILE")
    given = parser.parse_args()
    if len(given.block) != (0 if given.write else 2):
        parser.error("either KIND NAME or --write FILE ...")
    for file in given.write:
        file.write_text(written(file.read_text()))
    if given.block:
        print(made(*given.block), end="")


if __name__ == "__main__":
    main()
