"""Record a small real trace for the tests:  python experiments/record_trace.py [FOLDER] [WORDS...]

Profiles two calls of a policy of full width with one layer a stage and two denoising steps, as a run does, and writes
FOLDER/kineto_GPU_real.json.gz (FOLDER: tests/data/traces): some tens of kB. WORDS choose the stack (stack=2_sdpa).
Every event that is kept is as PyTorch's profiler wrote it; left out are those that are not read: operations that
multiply nothing, arrows, what says where the file was made. Needs a GPU (exit code 3); exit code 1 where the small file
does not say the same as the whole one.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from pi0exp import compose, subject
from pi0exp.breakdown import break_down
from pi0exp.breakdown_text import text
from pi0exp.load import gpu_slug
from pi0exp.profiling import TRACE, profile
from pi0exp.slices import Ceilings
from pi0exp.traces import CEILINGS, product_of, read_trace

SMALL = (
    *("model.vision.depth=1", "model.paligemma.depth=1", "model.expert.depth=1", "model.vocab_size=4096"),
    "workload.num_steps=2",
)
NOMINAL = Ceilings(1e15, 4e12, "BFloat16")
"""Of no machine in particular: the file is for tests of the reader, its shares of ceilings mean nothing."""
_KEPT = ("kernel", "gpu_memcpy", "gpu_memset", "user_annotation")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    if not torch.cuda.is_available():
        print("record_trace: needs a GPU; there is none", file=sys.stderr)
        return 3
    words = [word for word in arguments if "=" in word] or ["stack=2_sdpa"]
    folders = [Path(word) for word in arguments if "=" not in word] or [ROOT / "tests" / "data" / "traces"]
    device = torch.device("cuda", 0)
    instance = subject.subject(compose.from_words([*SMALL, *words])).build(device, 2, print)
    for index in range(5):
        instance.call(index)
    target = folders[0] / f"kineto_{gpu_slug(torch.cuda.get_device_name(device))}_real.json.gz"
    with tempfile.TemporaryDirectory() as scratch:
        whole = profile(instance, 2, NOMINAL, Path(scratch, TRACE))
        found = json.loads(gzip.decompress(Path(scratch, TRACE).read_bytes()), strict=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(json.dumps(slim(found)).encode(), mtime=0))
    kept = read_trace(target)
    print(text(break_down(kept), 10))
    print(f"\n{target}: {target.stat().st_size / 1e3:.0f} kB, {len(kept.slices)} slices in {kept.calls} calls")
    return 0 if kept == whole else 1


def slim(found: dict[str, Any]) -> dict[str, Any]:
    """A Chrome trace of PyTorch's profiler without what is not read of it."""
    events = [event for event in found["traceEvents"] if event.get("ph") == "X" and _read(event)]
    return {name: found[name] for name in ("schemaVersion", CEILINGS) if name in found} | {"traceEvents": events}


def _read(event: dict[str, Any]) -> bool:
    category = str(event.get("cat", "")).lower()
    if category == "cpu_op":
        return product_of(str(event["name"]), event.get("args") or {}) is not None
    return category in _KEPT or category.endswith(("_runtime", "_driver"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
