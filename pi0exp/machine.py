"""This machine: its GPU, as the vendor's management library describes it, and versions. Opens no GPU context.

    python -m pi0exp.machine [--json]

also says which options and named stacks it can run.

The only file that reads or sets environment variables.
"""

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pi0exp import gpus, pipes
from pi0exp.gpus import Gpu

PACKAGES = ("torch", "triton", "pi0exp", "amd-aiter")
"""Distributions whose versions, where they are installed, belong to the identity of a measurement."""
VISIBILITY = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""Variables by which GPUs are hidden from a process: of ROCm, of HIP on top of it, of CUDA (and HIP)."""
_HELD = "PI0EXP_GPU"


@dataclass(frozen=True)
class Machine:
    """gpu: its name, "CPU" where there is none. vendor: "nvidia", "amd" or "cpu". arch: "sm_90", "gfx950" or "".

    memory_mb: of the GPU. driver: its version. cpu, cores: host processor. versions: package -> version.
    """

    gpu: str = "CPU"
    vendor: str = "cpu"
    arch: str = ""
    memory_mb: int = 0
    driver: str = ""
    cpu: str = ""
    cores: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def has_gpu(self) -> bool:
        return self.vendor != "cpu"

    def without_gpu(self) -> "Machine":
        """The same machine for a measurement on its CPU."""
        return replace(self, gpu="CPU", vendor="cpu", arch="", memory_mb=0, driver="")

    def identity(self) -> dict[str, Any]:
        """What makes a measurement on another machine another measurement."""
        facts = asdict(self)
        return {k: v for k, v in facts.items() if k not in ("cpu", "cores")} if self.has_gpu else facts


@cache
def this_machine() -> Machine:
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    machine = Machine(cpu=_cpu(), cores=os.cpu_count() or 0, versions={"python": platform.python_version(), **versions})
    return replace(machine, **next((gpu.facts for gpu in visible_gpus()), {}))


def visible_gpus() -> list[Gpu]:
    """The GPUs that torch will see, the first one first; none with a torch that cannot drive a GPU."""
    build = _version("torch")
    if "+cpu" in build:
        return []
    visible = visibility()
    return gpus.amd(visible) if "rocm" in build else gpus.nvidia(visible.get("CUDA_VISIBLE_DEVICES"))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def commit() -> tuple[str, str]:
    """The commit of the checkout this runs from, and whether it was changed: "true", "false" or "unknown".

    Where git cannot be asked, the commit is read from its files; PI0EXP_COMMIT, taken at its word, may end in -dirty.
    ("", "unknown") where nothing is known.
    """
    if given := os.environ.get("PI0EXP_COMMIT", ""):
        return given.removesuffix("-dirty"), str(given.endswith("-dirty")).lower()
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "", "unknown"
    try:
        return _git(root, "rev-parse", "HEAD"), str(bool(_git(root, "status", "--porcelain"))).lower()
    except (OSError, subprocess.CalledProcessError):  # no git, or it does not trust the folder's owner
        return _head(root / ".git"), "unknown"


def _head(folder: Path) -> str:
    """The commit that a .git folder has checked out; "" where it does not say."""
    try:
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (folder / name).is_file():
            return (folder / name).read_text().strip()
        packed = (line.split() for line in (folder / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), "")
    except OSError:
        return ""


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


def quiet_mlflow() -> None:
    """Before mlflow is imported: no telemetry, no installation id in the home folder, nothing among our output."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def tracking_uri() -> str | None:
    """MLflow's own variable, for whoever has a server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def store_environment() -> dict[str, str]:
    """MLflow's variables: where its server is, and who we are there."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}


def visibility() -> dict[str, str]:
    """Those of `VISIBILITY` that are set."""
    return {name: os.environ[name] for name in VISIBILITY if name in os.environ}


def set_visibility(visible: Mapping[str, str]) -> None:
    """What `visibility` told in another process."""
    for name in VISIBILITY:
        os.environ.pop(name, None)
    os.environ.update(visible)


def ceilings_path() -> str | None:
    """PI0EXP_CEILINGS: the file in which what GPUs were measured to reach is kept, in the place of the usual one."""
    return os.environ.get("PI0EXP_CEILINGS") or None


def gpu_locks_path() -> str | None:
    """PI0EXP_GPU_LOCKS: the folder of the locks of GPUs, for containers that share GPUs but no /tmp."""
    return os.environ.get("PI0EXP_GPU_LOCKS") or None


def held_gpu() -> str | None:
    """The UUID of the GPU that the process which started this one holds for it."""
    return os.environ.get(_HELD) or None


def holding(uuid: str) -> dict[str, str]:
    """What tells a process that a GPU is held for it."""
    return {_HELD: uuid}


def wants_full_errors() -> bool:
    """Hydra's variable: show tracebacks instead of one line."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def let_hydra_raise() -> None:
    """Make Hydra raise its errors instead of printing them over many lines and leaving."""
    os.environ["HYDRA_FULL_ERROR"] = "1"


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of the measuring process: this one's and `more`, output unbuffered."""
    return {**os.environ, **more, "PYTHONUNBUFFERED": "1"}


@contextmanager
def kept_environment() -> Iterator[None]:
    """Whatever sets variables within it, processes started afterwards do not see them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def let_aiter_use(table: str) -> None:
    """AMD's aiter finds its tuned products in this file; it looks once, when it is first imported."""
    os.environ["AITER_CONFIG_GEMM_BF16"] = table


def set_environment(values: Mapping[str, str]) -> None:
    """Variables that libraries of this process read at their first use: to be set before."""
    os.environ.update(values)


def missing_environment(values: Mapping[str, str]) -> list[str]:
    """Which of these variables this process does not have, each as NAME=value."""
    return [f"{name}={value}" for name, value in values.items() if os.environ.get(name) != value]


if __name__ == "__main__":
    from pi0exp.machine_table import main  # not above: it imports this file

    pipes.leave(main)
