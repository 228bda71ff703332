"""Equal performance per watt:  python -m pi0exp.parity --reference h200.json --candidate mi350.json

At which latency does a candidate do as many calls a second and watt as the reference?

    1 / (t_cand P_cand) = 1 / (t_ref P_ref)   =>   t_cand = P_ref / P_cand * t_ref

Asked twice: with rated power (700 W and 1000 W turn 32.9 ms into 23.0 ms), and with the power of the calls.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi0exp import compose, pipes
from pi0exp.card import console
from pi0exp.differences import WORK, leaves
from pi0exp.errors import UserError
from pi0exp.load import read_record, result_files
from pi0exp.operands import name_of
from pi0exp.option import Numerics
from pi0exp.result import CONFIG_ERROR, Outcome
from pi0exp.track import Record

LATENCY, POWER, ENERGY, DOUBT = "latency_ms/p50", "power_w/mean", "energy_j/call", "energy_j/uncertainty"
RATED_W = {"NVIDIA H200": 700.0, "NVIDIA H100 80GB HBM3": 700.0, "AMD Instinct MI350X": 1000.0}
"""Rated power of a whole module as its data sheet has it: H200 and H100 (SXM, configurable up to 700 W), MI350X (1000 W
TBP)."""
EPILOG = """examples:
  python -m pi0exp.parity --reference h200.json --candidate mi350.json
  python -m pi0exp.parity --reference h200.json --candidate results/ --reference-watts 700 --candidate-watts 1000

Files are results as `track.results=` writes them. The latency is that of the device, p50, calls back to back. Of a
folder those are taken that are ok and did the reference's work; what is left out is listed.

exit codes: 0 answered, whoever meets the target; 2 a file that cannot be read, a run that is not ok, other work, or
power that nobody knows."""


@dataclass(frozen=True)
class Answer:
    """On one basis for one candidate. margin: target / latency - 1; above 0 the candidate has more calls a watt.

    reference_w, candidate_w: power. target_ms: the latency of equal performance per watt; at most that meets it.
    uncertainty: share by which counter and samples of the power disagree, both sides' together; None where not known.
    """

    basis: str
    candidate: str
    reference_w: float
    candidate_w: float
    target_ms: float
    latency_ms: float
    uncertainty: float | None = None

    @property
    def meets(self) -> bool:
        return self.latency_ms <= self.target_ms

    @property
    def margin(self) -> float:
        return self.target_ms / self.latency_ms - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"meets": self.meets, "margin": self.margin}


def target_ms(reference_ms: float, reference_w: float, candidate_w: float) -> float:
    """Milliseconds at which both do as many calls a second and watt."""
    return reference_w / candidate_w * reference_ms


def rated_w(record: Record, given: float | None) -> float | None:
    """Watts as they were given, else of the data sheet; None where nobody knows."""
    return given if given is not None else RATED_W.get(str(record["fingerprint"].get("gpu", "")))


def measured_w(record: Record) -> float | None:
    """Mean watts while the calls ran; None where the record has none."""
    found = record["metrics"].get(POWER)
    return float(found) if found is not None and math.isfinite(found) and found > 0 else None


def uncertainty(*records: Record) -> float | None:
    """Of the ratio of their energies, as a share: root of the sum of squares; None where one of them does not say."""
    shares = []
    for record in records:
        energy, doubt = (record["metrics"].get(name) for name in (ENERGY, DOUBT))
        if energy is None or doubt is None:
            return None
        shares.append(doubt / energy)
    return math.hypot(*shares)


def checked(path: Path, record: Record) -> Record:
    if record["outcome"] != Outcome.OK:
        raise UserError(f"{path}: the run is {record['outcome']}, it has no latency to compare")
    return record


def work_of(record: Record) -> dict[str, str]:
    """Subject, model and workload, setting by setting: performance is only equal on equal work.

    As parameters where a run has them, which a reader knows; the dimensions of a model are in the experiment only.
    """
    whole = leaves({section: record["experiment"].get(section) for section in WORK})
    asked = {name: value for name, value in record["params"].items() if name.partition(".")[0] in WORK}
    found = {name: str(value) for name, value in whole} | {"subject": compose.defaults()["subject"]} | asked
    return {name: value for name, value in found.items() if name not in _NO_WORK}


_NO_WORK = ("workload", "workload.name", "workload.seed", "model.seed")


def same_work(path: Path, reference: Record, candidate: Record) -> None:
    a, b = work_of(reference), work_of(candidate)
    other = sorted(name for name in {**a, **b} if a.get(name) != b.get(name))
    # What follows from another subject or model is said by its name.
    names = [name for name in ("subject", "model") if name in other]
    told = names[:1] if "subject" in names else [*names, *(one for one in other if one.partition(".")[0] not in names)]
    if told:
        texts = (f"{name} {a.get(name, '-')}, {b.get(name, '-')}" for name in told)
        raise UserError(f"{path}: other work than the reference: {'; '.join(texts)}")


def answers(
    reference: Record, candidates: dict[str, Record], reference_w: float | None, candidate_w: float | None
) -> tuple[list[Answer], list[str]]:
    """With rated and with measured power, and a sentence for each power that nobody knows.

    reference_w, candidate_w: rated power as the user gives it. Raises UserError where a candidate has no answer.
    """
    made, notes = [], []
    own = {"rated": rated_w(reference, reference_w), "measured": measured_w(reference)}
    for name, candidate in candidates.items():
        latency = float(candidate["metrics"][LATENCY])
        theirs = {"rated": rated_w(candidate, candidate_w), "measured": measured_w(candidate)}
        lacking = []
        for basis in own:
            pair = own[basis], theirs[basis]
            if pair[0] is None or pair[1] is None:
                whose = "the reference" if pair[0] is None else name  # without that one a candidate's says nothing
                lacking.append(f"{basis} power: not known of {whose} ({_HINTS[basis]})")
            else:
                target = target_ms(float(reference["metrics"][LATENCY]), pair[0], pair[1])
                doubt = uncertainty(reference, candidate) if basis == "measured" else None
                made.append(Answer(basis, name, pair[0], pair[1], target, latency, doubt))
        if len(lacking) == len(own):
            raise UserError("; ".join(lacking))
        notes += lacking
    return made, list(dict.fromkeys(notes))


_HINTS = {
    "rated": "give --reference-watts and --candidate-watts",
    "measured": f"no {POWER} in the record: rated power only",
}


def label(record: Record) -> str:
    """The GPU and what ran; also the error where other actions were declared."""
    name = f"{record['fingerprint'].get('gpu', '?')}: {name_of(record['params']) or record['key']}"
    if record["numerics"] != Numerics.APPROXIMATE.name:
        return name
    error = record["metrics"].get("error/rel_l2")
    return f"{name} ({record['numerics']}, {'error not known' if error is None else f'rel L2 {error:.1e}'})"


def fitting(paths: list[Path], reference: Record) -> tuple[dict[str, Record], list[str]]:
    """Candidates by their labels, the fastest first, and a sentence for each result in a folder that is none.

    Raises UserError for a file that was named and is none, and where nothing is left.
    """
    found: dict[str, Record] = {}
    left_out = []
    for given in paths:
        for path in result_files([given]):
            record = read_record(path)
            try:
                checked(path, record)
                same_work(path, reference, record)
            except UserError as error:
                if not given.is_dir():
                    raise
                left_out.append(f"left out: {error}")
                continue
            name = label(record)
            found[name if name not in found else f"{name} ({path})"] = record
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no result there did the reference's work and ended ok")
    return dict(sorted(found.items(), key=lambda item: item[1]["metrics"][LATENCY])), left_out


def sentence(one: Answer) -> str:
    """Who meets it, by how much."""
    share = abs(100 * one.margin)
    verdict = (
        f"meets it, {share:.1f} % more calls a watt" if one.meets else f"misses it, {share:.1f} % fewer calls a watt"
    )
    if one.uncertainty is not None:
        within = ", which is within it" if abs(one.margin) <= one.uncertainty else ""
        verdict += f" (power known to {100 * one.uncertainty:.1f} %{within})"
    return (
        f"{one.basis} power: {one.reference_w:.0f} W / {one.candidate_w:.0f} W -> target {one.target_ms:.2f} ms;"
        f" {one.candidate} needs {one.latency_ms:.2f} ms: {verdict}"
    )


def watts(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is no number of watts above 0")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pi0exp.parity",
        description="The latency at which a candidate has the reference's performance per watt, and who meets it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="a result file")
    parser.add_argument(
        "--candidate", type=Path, required=True, nargs="+", metavar="FILE", help="result files, folders"
    )
    parser.add_argument("--reference-watts", type=watts, metavar="W", help="rated power; default: of the data sheet")
    parser.add_argument("--candidate-watts", type=watts, metavar="W", help="rated power; default: of the data sheet")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args(arguments)
    try:
        reference = checked(given.reference, read_record(given.reference))
        candidates, left_out = fitting(given.candidate, reference)
        found, notes = answers(reference, candidates, given.reference_watts, given.candidate_watts)
        notes += left_out
    except UserError as error:
        print(f"pi0exp: {' '.join(str(error).split())}", file=sys.stderr)
        return CONFIG_ERROR
    time = reference["metrics"][LATENCY]
    if given.json:
        own = {"label": label(reference), "latency_ms": time, POWER: measured_w(reference)}
        print(json.dumps({"reference": own, "answers": [one.to_dict() for one in found], "notes": notes}, indent=2))
        return 0
    lines = [f"reference {label(reference)}: {time:.2f} ms", *map(sentence, found), *notes]
    console().print("\n".join(lines), markup=False)
    return 0


if __name__ == "__main__":
    pipes.leave(main)
