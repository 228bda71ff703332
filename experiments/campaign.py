"""Run the studies one after the other, the most important first, within a time limit.

    python experiments/campaign.py --minutes 9 --quick --results experiments/results
    python experiments/campaign.py --minutes 9 --quick ladder masking model=tiny

Each study is a process of `python -m pi0exp`, so that one that fails does not stop the next. First the result files of
the studies that are already there are brought into the store: what is settled is not measured again. At the limit the
running study is interrupted, which ends the point that it measures. Then a line a study says what is complete and what
is missing; the same command goes on there. What each study took is kept in RESULTS/campaign.jsonl; the time that the
rest needs is estimated from it. Ctrl-C, SIGTERM and SIGHUP end the campaign as the limit does: the running study gets
the signal, ends its point and frees the GPU.

A point that was measured with other code is another one, and is measured again. With --missing it is not: only what no
result file has from this kind of GPU is, so that a study can grow over days; its tables name every commit.

exit codes: 0 all complete; 1 something is missing or failed; 2 what was asked for cannot be; 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pi0exp import compose, interrupts
from pi0exp.result import CONFIG_ERROR

ORDER = (
    *("ladder", "masking", "ablation", "perf_per_watt", "batch_scaling", "attention_backends", "graph_capture"),
    *("kernels", "gemm_efficiency", "prompt_and_horizon", "breakdown", "ladder_layers", "graph_granularity"),
    *("fidelity", "compile_modes"),
)
"""By importance; studies that are not named here follow in the order of the alphabet."""
CLOSING = re.compile(r"^study (\S+): (\d+) of (\d+) points settled(?:, complete|; missing: (.*?); )", re.MULTILINE)
STUDY = (sys.executable, "-m", "pi0exp")
"""The command that measures one."""
GRACE_S = 20.0
"""For an interrupted study to end its point and write what it has."""
LONGEST_S = 1e6
"""Without a limit, eleven days: with a time to wait, what was read before an interruption is not lost."""


def main(arguments: list[str] | None = None) -> int:
    usage, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=usage, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="STUDY|WORD", help="studies (default: all), and words for each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; default: no limit")
    parser.add_argument("--quick", action="store_true", help="measure=quick")
    parser.add_argument(
        "--missing", action="store_true", help="only points without a result file, whatever code made it"
    )
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="where results are written")
    parser.add_argument("--root", type=Path, help="folder of the MLflow store; default: mlruns of the repository")
    given = parser.parse_intermixed_args(arguments)
    known = sorted(
        compose.files()["study"], key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)
    )
    named = [word for word in given.words if "=" not in word]
    if unknown := [name for name in named if name not in known]:
        print(f"campaign: {unknown[0]}: no such study; there are {', '.join(known)}", file=sys.stderr)
        return CONFIG_ERROR
    words = [word for word in given.words if "=" in word] + (["measure=quick"] if given.quick else [])
    own = [] if given.root is None else [f"track.root={given.root}"]
    end = time.monotonic() + 60 * given.minutes - GRACE_S
    given.results = given.results.resolve()  # the studies run in the repository
    given.results.mkdir(parents=True, exist_ok=True)
    log, rows, stopped = given.results / "campaign.jsonl", [], ""
    studies = named or known
    try:
        with interrupts.held():  # let in where something is waited for: what was measured has its row
            for study in studies:
                if stopped or time.monotonic() >= end:
                    break
                mine = [*words, *own, f"track.results={given.results}"]
                if given.missing and (found := lacking(study, given.results, mine)):
                    lines, mine = found
                    if not lines:
                        rows.append({"study": study, "state": "complete"})
                        continue
                    mine += [sweep_of(lines), "hydra.sweeper.params=null"]
                else:
                    bring_in(given.results / study, given.root)
                row, stopped = run(study, mine, end - time.monotonic())
                rows.append(row)
                with log.open("a") as file:
                    file.write(json.dumps(row | {"words": words}) + "\n")
    except KeyboardInterrupt as error:
        stopped = stopped or interrupts.cause(error)
    rows += [{"study": study, "state": "not begun"} for study in studies[len(rows) :]]
    earlier = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    for row in rows:
        print(line_of(row, [one for one in earlier if one["study"] == row["study"] and one["words"] == words]))
    if stopped:
        print(f"campaign: interrupted by {stopped}", file=sys.stderr)
        return 128 + number(stopped)
    return int(any(row["state"] != "complete" for row in rows))


def number(name: str) -> int:
    """Of a signal, by the name that `interrupts` gives it."""
    return next(int(one) for one, its in interrupts.SIGNALS.items() if its == name)


def lacking(name: str, results: Path, words: list[str]) -> tuple[list[str], list[str]] | None:
    """The planned points of a study that have no settled result of this kind of GPU, each as a line of words.

    words: of the command line. They choose among the points, and those that no point says stay for all of them: second.
    None for a study whose points nobody planned, as a search.
    """
    # They take three seconds to import, which a campaign without --missing would pay for nothing.
    from pi0exp.load import gpu_slug, readable
    from pi0exp.machine import this_machine
    from pi0exp.outcomes import settled
    from pi0exp.report import sources
    from pi0exp.report.rows import holds, unmeasured
    from pi0exp.report.study import study as study_of

    study = study_of(name)
    if not any(study.planned):  # one point without words
        return None
    pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in words]
    asked = [(key, value) for key, value in pairs if key.partition(".")[0] not in ("measure", "track", "resume")]
    folder = results / name
    files = readable([folder]) if folder.is_dir() else ()
    found = sources.sorted_out(record for _, record in files).get(name, {}).get(gpu_slug(this_machine().gpu), [])
    said = {key for line in study.planned for key in line}
    free = {"model", "workload"} - said - {key for key, _ in asked}  # then those of the study itself are meant
    kept = [
        record
        for record in found
        if settled(record)
        and all(holds(record, *pair) for pair in asked)
        and all(study.has(key, record["params"].get(key, "")) for key in free)
    ]
    chosen = [
        line for line in unmeasured(study, kept, asked) if all(line.get(key, value) == value for key, value in asked)
    ]
    lines = [shlex.join(f"{key}={value}" for key, value in line.items()) for line in chosen]
    return lines, [word for word, (key, _) in zip(words, pairs, strict=True) if key not in said]


def sweep_of(lines: list[str]) -> str:
    """The word that makes a sweep of these points."""
    quoted = (line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return "hydra.sweeper.points=[" + ",".join(f'"{line}"' for line in quoted) + "]"


def bring_in(folder: Path, root: Path | None) -> None:
    """Result files of a study into the store; what cannot be read is told, and left out."""
    if not folder.is_dir():
        return
    own = [] if root is None else ["--root", str(root)]
    command = [sys.executable, "-m", "pi0exp.load", "--each", str(folder), *own]
    with interrupts.allowed():
        code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True).returncode
    if code:
        print(f"campaign: {folder}: not in the store; what it lacks is measured again", file=sys.stderr, flush=True)


def run(study: str, words: list[str], seconds: float) -> tuple[dict[str, Any], str]:
    """One study, interrupted after so many seconds; and the name of the signal that interrupted the campaign, or "".

    state: complete, missing points, interrupted, or failed.
    """
    with interrupts.allowed():  # a signal that came before: nothing is begun
        began = time.monotonic()
    print(f"campaign: {study}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [*STUDY, f"study={study}", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the campaign alone, which passes it on
    )
    limit, stopped = False, ""
    try:
        with interrupts.allowed():
            out, _ = process.communicate(timeout=min(max(seconds, 1.0), LONGEST_S))
    except subprocess.TimeoutExpired:
        limit = True
        out = interrupted(process, signal.SIGINT)
    except KeyboardInterrupt as error:
        stopped = interrupts.cause(error)
        out = interrupted(process, number(stopped))
    print(out, end="", flush=True)
    row: dict[str, Any] = {"study": study, "seconds": round(time.monotonic() - began, 1), "code": process.returncode}
    if found := CLOSING.search(out):
        settled, points, missing = int(found[2]), int(found[3]), found[4]
        row |= {"settled": settled, "points": points, "state": f"missing: {missing}" if missing else "complete"}
    elif limit or stopped:
        row["state"] = f"interrupted {'at the limit' if limit else f'by {stopped}'}"
    else:
        row["state"] = f"failed with exit code {process.returncode}"
    return row, stopped


def interrupted(process: "subprocess.Popen[str]", by: int) -> str:
    """Send a study this signal; what it printed. One that does not end in time is killed."""
    process.send_signal(by)
    try:
        return process.communicate(timeout=GRACE_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def line_of(row: dict[str, Any], earlier: list[dict[str, Any]]) -> str:
    """What became of a study, and the seconds that it took when it was complete before, if it ever was."""
    text = f"{row['study']}: {row['state']}"
    if "points" in row:
        text += f", {row['settled']} of {row['points']} points settled in {row['seconds']:.0f} s"
    whole = [one["seconds"] for one in earlier if one["state"] == "complete"]
    if row["state"] != "complete":
        text += f"; took {max(whole):.0f} s before" if whole else "; time needed: not known"
    return text


if __name__ == "__main__":
    interrupts.install()
    sys.exit(main())
