"""Measures points on pretended GPUs:  python lock_parent.py LOG GPUS POINTS CHILD

GPUS are UUIDs, separated by commas. Each point is one call of pi0exp.isolate with CHILD, tests/lock_child.py or another
module. Prints what the progress line says.
"""

import sys

from pi0exp import gpu_lock, isolate
from pi0exp.gpus import Gpu


def main(log: str, gpus: str, points: int, child: str) -> None:
    facts = {"gpu": "NVIDIA H200", "vendor": "nvidia"}
    visible = [Gpu(uuid, facts, {"CUDA_VISIBLE_DEVICES": uuid}) for uuid in gpus.split(",")]
    gpu_lock.visible_gpus = lambda: visible
    isolate.CHILD = child
    for _ in range(points):
        result = isolate.measure_isolated({"log": log}, 60, lambda text: print(text, flush=True), on_gpu=True)
        print(result.outcome, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
