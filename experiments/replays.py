"""Many calls of one policy: drift, leaks, and bits that differ.

python experiments/replays.py --calls 10000
python experiments/replays.py --calls 100000 --depth 2
compute-sanitizer --tool memcheck python experiments/replays.py --calls 2 --depth 2 --eager

Eight observations rotate. What comes of each is compared, bit by bit, with what came of it in the first round, on the
device, so that calls follow each other without a pause; the memory that PyTorch holds is compared with that after the
first round. A line of JSON: calls, those that differed, the largest difference, bytes more than in the beginning.

Exit codes: 0 all equal and nothing leaked; 2 wrong words; 3 no GPU or a stack that it cannot run; 4 otherwise.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from pi0exp import compose
from pi0exp.errors import UserError
from pi0exp.machine import this_machine
from pi0exp.policy_subject import PolicySubject
from pi0exp.result import CONFIG_ERROR, Outcome

INPUTS = 8


def held_bytes(device: torch.device) -> int:
    """What tensors hold, less those that only wait for Python's collector."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def replayed(subject: PolicySubject, calls: int, device: torch.device) -> dict[str, float]:
    """What `calls` calls show."""
    policy = subject.policy(device)
    items = subject.on_device(subject.inputs(INPUTS).items, device)
    first = [policy.sample_actions(*item) for item in items]
    differing = torch.zeros((), dtype=torch.int64, device=device)
    largest = torch.zeros((), device=device)
    before = held_bytes(device)
    for i in range(calls):
        actions, expected = policy.sample_actions(*items[i % INPUTS]), first[i % INPUTS]
        off = (actions - expected).abs().max()
        differing += ~(off == 0)  # a NaN differs, too
        largest = torch.maximum(largest, off)
    more = held_bytes(device) - before
    # The last call's tensors are still there, and the two results.
    own = 4096 + 8 * first[0].numel() * first[0].element_size()
    return {
        "calls": calls, "differing": int(differing), "largest": float(largest), "bytes_more": max(0, more - own)
    }  # fmt: skip


def main(words: list[str]) -> int:
    title, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(description=title, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--depth", type=int, help="layers of each transformer; default: the model's")
    parser.add_argument("--eager", action="store_true", help="without graphs, for tools that look into kernels")
    parser.add_argument("words", nargs="*", help="of the command line of pi0exp; default: stack=9_blocks")
    given = parser.parse_args(words)
    chosen = given.words or ["stack=9_blocks"]
    if given.depth is not None:
        chosen += [f"model.{stack}.depth={given.depth}" for stack in ("vision", "paligemma", "expert")]
    chosen += ["graphs=none"] if given.eager else []
    try:
        if given.calls < 1:
            raise UserError(f"--calls is {given.calls}; it must be 1 or more")
        subject = PolicySubject.from_plain(compose.from_words(chosen))
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return CONFIG_ERROR
    machine = this_machine()
    if reasons := subject.unmet(machine):
        print(f"{parser.prog}: {'; '.join(reasons)}", file=sys.stderr)
        return Outcome.UNSUPPORTED.exit_code
    device = torch.device("cuda", 0) if machine.has_gpu else torch.device("cpu")
    found = replayed(subject, given.calls, device)
    print(json.dumps({"words": chosen, "gpu": machine.gpu} | found))
    good = found["differing"] == 0 and found["bytes_more"] == 0
    return Outcome.OK.exit_code if good else Outcome.WRONG_NUMERICS.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
