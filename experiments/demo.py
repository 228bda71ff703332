"""The main job on this machine: `python -m pi0exp workload=aloha`, with the tiny model where there is no GPU."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pi0exp.machine import this_machine


def main() -> int:
    machine = this_machine()
    torch = machine.versions.get("torch", "not installed")
    if machine.has_gpu:
        model, why = [], f"this machine has a GPU, {machine.gpu}: Pi0 at full size"
    else:
        model, why = ["model=tiny"], f"no GPU that torch {torch} can use: the tiny model on the CPU"
    words = [*model, "workload=aloha"]
    print(f"{why}\npython -m pi0exp {' '.join(words)}\n", flush=True)
    code = subprocess.run([sys.executable, "-m", "pi0exp", *words], cwd=ROOT).returncode
    if code == 0:
        print("\nThe run is in mlruns/. make ui shows it, python -m pi0exp --help what else there is to try.")
    return code


if __name__ == "__main__":
    sys.exit(main())
