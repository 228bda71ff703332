"""AMD's aiter: whether it is the package that is installed, for which GPU it takes this one, which table it reads.

Written from the source of v0.1.20.post1; the calls made from here bind at v0.1.16 and v0.1.18 too. Nothing here has run
on AMD hardware: `tests/test_aiter.py` holds it to recorded signatures and to what aiter's source checks.

`import aiter` needs ROCm, may compile for minutes and reads its settings once, so it is done where an option is
applied. `python -m pi0exp.aiter` prints the versions that a table with hipBLASLt rows must carry in its sidecar.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from pi0exp.errors import UnsupportedError
from pi0exp.machine import let_aiter_use
from pi0exp.option import Requires

DISTRIBUTION = "amd-aiter"
OLDEST = "0.1.16"
"""The first version that finds tuned products by architecture; those before it take another GPU's rows for its own."""

INSTINCT = Requires(vendors=("amd",), archs=("gfx942", "gfx950"))
"""The GPUs that AMD builds aiter for: MI300X and MI325X, MI350X and MI355X."""

_HOME = "install it from its repository, https://github.com/ROCm/aiter"


def unmet_package() -> list[str]:
    """Why AMD's aiter cannot be imported, without importing it: the import builds and needs ROCm."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        return [f"needs AMD's aiter ({DISTRIBUTION}), which is not installed: {_HOME}"]
    if not any(Path(place, "ops", "mha.py").is_file() for place in spec.submodule_search_locations or ()):
        return [
            f"needs AMD's aiter ({DISTRIBUTION}); the package that PyPI calls aiter (async iterators,"
            f" version {_version('aiter')}) is installed: remove it; AMD's is {DISTRIBUTION}, {_HOME}"
        ]
    found = _version(DISTRIBUTION)
    # A checkout that was installed without its tags has a development version that says nothing of its age.
    if found != "unknown" and not Version(found).is_devrelease and Version(found) < Version(OLDEST):
        return [f"needs {DISTRIBUTION}>={OLDEST}; {found} is installed"]
    return []


def described() -> str:
    """Name and version, for what is said to have been applied."""
    return f"{DISTRIBUTION} {_version(DISTRIBUTION)}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def attention_module() -> Any:
    """The package, with its public attention functions. Raises ImportError where it cannot be imported."""
    return import_module("aiter")


_table: Path | None = None
"""The table that aiter was imported with in this process."""


def gemm_module(table: Path) -> Any:
    """aiter's tuned products, reading `table`.

    Raises UnsupportedError where aiter was imported before with another table or none: it looks only once.
    """
    global _table
    if "aiter" in sys.modules and _table != table:
        raise UnsupportedError(
            f"this process has imported aiter with {_table or 'its own tables'}, and it reads tables only once:"
            f" {table} needs a process of its own"
        )
    let_aiter_use(str(table))
    _table = table
    return import_module("aiter.tuned_gemm")


@dataclass(frozen=True)
class Gpu:
    """What tuned products are found by. gfx: "gfx950". compute_units: 256 (MI350X, MI355X), 304 (MI300X)."""

    gfx: str
    compute_units: int

    def __str__(self) -> str:
        return f"{self.gfx} with {self.compute_units} compute units"


def aiter_gpu(device: torch.device) -> Gpu:
    """The GPU as aiter looks it up. Raises UnsupportedError where GPU_ARCHS or CU_NUM make it another than it is."""
    chip = import_module("aiter.jit.utils.chip_info")
    found, real = Gpu(chip.get_gfx(), chip.get_cu_num()), torch_gpu(device)
    if found != real:
        raise UnsupportedError(f"aiter takes this GPU for {found}; it is {real}: unset GPU_ARCHS and CU_NUM")
    return real


def torch_gpu(device: torch.device) -> Gpu:
    """The GPU as PyTorch sees it."""
    facts = torch.cuda.get_device_properties(device)
    # "gfx950:sramecc+:xnack-": the features behind the name do not tell GPUs apart here.
    return Gpu(facts.gcnArchName.split(":")[0], facts.multi_processor_count)


def blas_versions() -> dict[str, str]:
    """{"rocm": ..., "hipblaslt": ...}, as PyTorch validates its own tuned products; "" for what it does not say."""
    pairs: Any = torch.cuda.tunable.get_validators()  # of strings; its annotation says less
    known = dict(pairs)
    return {"rocm": known.get("ROCM_VERSION", ""), "hipblaslt": known.get("HIPBLASLT_VERSION", "")}


if __name__ == "__main__":
    print(json.dumps(blas_versions()))
