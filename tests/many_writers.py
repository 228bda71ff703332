"""Eight processes write 200 points into one store:  python many_writers.py STUDY WORD...

Each has 25 points of the tiny model, told apart by their seed, in one study, and was forked when everything was
imported. Nothing is measured: the result is there at once, so that they do nothing but write. WORDs name the store.
Ends with the largest exit code.
"""

import os
import sys
import traceback
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
from cli import QUICK

from pi0exp import compose, point
from pi0exp.backend import import_mlflow
from pi0exp.key import source_digest
from pi0exp.result import Outcome, Result

WRITERS, EACH = 8, 25
METRICS = {"latency_ms/p50": 1.0, "latency_ms/p90": 1.0, "latency_host_ms/p50": 1.0, "throughput_hz": 1e3}


def measured(*given: Any, **named: Any) -> Result:
    return Result(Outcome.OK, numerics="EXACT", metrics=METRICS, samples={"latency_ms": [1.0] * 20})


def main(study: str, store: list[str]) -> int:
    import_mlflow()
    source_digest()
    point.measure_isolated = measured
    plain = compose.from_words([*QUICK, *store, f"name={study}"])
    writers = []
    for writer in range(WRITERS):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                points = [plain | {"workload": plain["workload"] | {"seed": writer * EACH + i}} for i in range(EACH)]
                code = max(point.measure_point(one)["exit_code"] for one in points)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        writers.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
