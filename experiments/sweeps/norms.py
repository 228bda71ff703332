"""Launches of the kernels that move memory and little else:  python experiments/sweeps/norms.py OUT.json

Norms with the residual sum before them, the gated activation, and splitting and turning q, k and v: for each of Pi0's
shapes the launches below, and as `table` the one that the kernel's file has. A CUDA graph of calls that take turns on
as many sets of arguments as exceed the L2, or on 8 where one fits it; the launches alternate, 7 rounds, or 3 where one
set exceeds the L2. Microseconds a call, medians, fastest first. `bytes` are the least that a call moves; `copy` is the
rate of a large copy in TB/s. Correctness is not checked here: tests/test_kernels.py does that. About 11 s on an H200.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

from pi0exp.ceilings import burst_ceilings
from pi0exp.experiments.sweeps import common
from pi0exp.kernels import adarms_norm, gated_activation, layer_norm, rms_norm, rope_qkv
from pi0exp.kernels.bench import captured, sample_us, set_count
from pi0exp.kernels.kernel import Case, Kernel, arguments_of

Launch = dict[str, int]
DEVICE = torch.device("cuda", 0)
SWEPT = ("add_rms_norm", "add_adarms_norm", "add_layer_norm", "gated_activation", "rope_qkv", "rope_qkv_cached")
CEILING_S = 2.0


def launches(name: str, *pairs: tuple[int, int]) -> list[Launch]:
    """(size, warps) each, the size under its name in the table."""
    return [{name: size, "num_warps": warps} for size, warps in pairs]


ROWS = launches("ROWS", (1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (4, 8))
VALUES = launches("BLOCK", (256, 1), (512, 2), (512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
HEADS = launches("ROWS", (1, 1), (2, 1), (4, 2), (4, 1), (8, 4), (8, 2), (16, 4), (32, 8))
GRID: dict[ModuleType, list[Launch]] = {
    rms_norm: ROWS,
    adarms_norm: ROWS,
    layer_norm: ROWS,
    gated_activation: VALUES,
    rope_qkv: HEADS,
}


def ranked(module: ModuleType, kernel: Kernel, case: Case) -> list[tuple[float, str]]:
    """(microseconds, launch) of one case, fastest first."""
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    large, sets = case.bytes_moved > l2_bytes, set_count(case.bytes_moved, l2_bytes)
    calls = sets * (2 if large else 12)
    given = [arguments_of(case, DEVICE, seed) for seed in range(sets)]
    graphs = {"table": captured(kernel.op, given, calls, DEVICE)}
    for launch in GRID[module]:
        with patch.dict(module.LAUNCH, dict.fromkeys(module.LAUNCH, launch)):
            graphs[str(launch)] = captured(kernel.op, given, calls, DEVICE)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(3 if large else 7):
        for name, graph in graphs.items():
            samples[name].append(sample_us(graph, DEVICE) / calls)
    return sorted((median(some), name) for name, some in samples.items())


def sweep(keep: Callable[[Any], None]) -> None:
    rows: list[Any] = []
    copy = burst_ceilings(torch.bfloat16, DEVICE, CEILING_S).bytes_per_s / 1e12
    print(f"copy {copy:.2f} TB/s")
    for module in GRID:
        for kernel in (one for one in module.KERNELS if one.name in SWEPT):
            for case in (one for one in kernel.cases if one.pi0):
                torch.cuda.empty_cache()
                rank = ranked(module, kernel, case)
                best = "; ".join(f"{us:.2f} {launch}" for us, launch in rank[:3])
                table = next(us for us, launch in rank if launch == "table")
                print(f"{kernel.name:16} {case.name:38} {table:8.2f} us as it is | {best}", flush=True)
                rows.append({"kernel": kernel.name, "case": case.name, "rank": rank, "bytes": case.bytes_moved})
                keep({"copy": copy, "rows": rows})


def main(words: list[str]) -> int:
    return common.run(str(__doc__), sweep, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
