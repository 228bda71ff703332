"""What is found of this machine, with management libraries that answer as the real ones do."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import pi0exp
from pi0exp import aiter, machine
from pi0exp.machine import Machine

UUIDS = ("GPU-4fa23c4e-2e34-1c39-a8a9-5f0f5e3b1a11", "GPU-9a5d1c02-77d1-6c1b-9a1e-0c2f6f2d7b22")


def fake_nvml(gpus: int = 2, driver: str = "570.124.06", no_driver: bool = False) -> ModuleType:
    """pynvml on a machine with H200s, or without a driver."""
    module: Any = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def by_index(index: int) -> int:
        if not 0 <= index < gpus:
            raise NVMLError("Invalid Argument")
        return index

    def by_uuid(uuid: str) -> int:
        if uuid not in UUIDS[:gpus]:
            raise NVMLError("Not Found")
        return UUIDS.index(uuid)

    def init() -> None:
        if no_driver:
            raise NVMLError("NVML Shared Library Not Found")
        module.open += 1

    def shutdown() -> None:
        module.open -= 1

    module.open, module.NVMLError = 0, NVMLError
    module.nvmlInit, module.nvmlShutdown = init, shutdown
    module.nvmlDeviceGetCount = lambda: gpus
    module.nvmlDeviceGetHandleByIndex, module.nvmlDeviceGetHandleByUUID = by_index, by_uuid
    module.nvmlDeviceGetUUID = lambda handle: UUIDS[handle]
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: ((9, 0), (10, 3))[handle]
    module.nvmlDeviceGetName = lambda handle: ("NVIDIA H200", "NVIDIA B300")[handle]
    module.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(
        total=150754820096, free=150000000000, used=754820096
    )
    module.nvmlSystemGetDriverVersion = lambda: driver
    return module


def fake_amdsmi(gpus: int = 1) -> ModuleType:
    """amdsmi on a machine with an MI350X."""
    module: Any = ModuleType("amdsmi")
    module.open = 0

    def init() -> None:
        module.open += 1

    def shut_down() -> None:
        module.open -= 1

    module.AmdSmiException = type("AmdSmiException", (Exception,), {})
    module.amdsmi_init, module.amdsmi_shut_down = init, shut_down
    module.amdsmi_get_processor_handles = lambda: list(range(gpus))
    module.amdsmi_get_gpu_asic_info = lambda handle: {
        "market_name": "AMD Instinct MI350X",
        "vendor_id": "0x1002",
        "device_id": "0x75a0",
        "num_compute_units": 256,
        "target_graphics_version": "gfx950",
    }
    module.amdsmi_get_gpu_vram_info = lambda handle: {"vram_type": 8, "vram_vendor": "SAMSUNG", "vram_size": 294896}
    module.amdsmi_get_gpu_driver_info = lambda handle: {"driver_name": "amdgpu", "driver_version": "6.14.14"}
    return module


def found(
    patch: pytest.MonkeyPatch, torch: str, visible: str | None = None, nvml: ModuleType | None = None, **amd: int
) -> Machine:
    """The machine with that build of torch and that CUDA_VISIBLE_DEVICES."""
    versions = {"torch": torch, "triton": "3.6.0", "pi0exp": "0.1.0"}
    patch.setattr(machine, "_version", lambda name: versions.get(name, ""))
    nvml = nvml or fake_nvml()
    patch.setitem(sys.modules, "pynvml", nvml)
    patch.setitem(sys.modules, "amdsmi", fake_amdsmi(**amd))
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        patch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = machine.this_machine.__wrapped__()
    assert nvml.open == 0, "left open"
    return made


def test_nvidia(monkeypatch: pytest.MonkeyPatch):
    made = found(monkeypatch, "2.11.0+cu130")
    assert (made.gpu, made.vendor, made.arch) == ("NVIDIA H200", "nvidia", "sm_90")
    assert (made.memory_mb, made.driver) == (143771, "570.124.06")
    assert made.has_gpu
    assert made.versions["torch"] == "2.11.0+cu130"
    assert set(made.versions) == {"python", "torch", "triton", "pi0exp"}
    assert made.cores == (os.cpu_count() or 0)


def test_version_of_aiter_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch):
    """Only where it is installed: what ran there may have been its kernels."""
    versions = {"torch": "2.11.0+rocm7.1", "amd-aiter": "0.1.5"}
    monkeypatch.setattr(machine, "_version", lambda name: versions.get(name, ""))
    monkeypatch.setitem(sys.modules, "amdsmi", fake_amdsmi())
    assert machine.this_machine.__wrapped__().identity()["versions"]["amd-aiter"] == "0.1.5"
    assert aiter.DISTRIBUTION in machine.PACKAGES


@pytest.mark.parametrize("torch", ["2.11.0", "2.12.0.dev20260401", "2.11.0a0+gitabcdef0"])
def test_build_without_a_telling_name_may_drive_nvidia(monkeypatch: pytest.MonkeyPatch, torch: str):
    assert found(monkeypatch, torch).vendor == "nvidia"


@pytest.mark.parametrize(
    ("visible", "gpu"),
    [
        (None, "NVIDIA H200"),
        ("0", "NVIDIA H200"),
        ("1", "NVIDIA B300"),
        ("1,0", "NVIDIA B300"),
        (" 1 , 0", "NVIDIA B300"),
        (UUIDS[0], "NVIDIA H200"),
        (f"{UUIDS[1]},{UUIDS[0]}", "NVIDIA B300"),
        ("", "CPU"),
        ("-1", "CPU"),
        ("-1,0", "CPU"),
        ("2", "CPU"),
        ("GPU-00000000-0000-0000-0000-000000000000", "CPU"),
    ],
)
def test_first_visible_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu: str):
    made = found(monkeypatch, "2.11.0+cu130", visible)
    assert made.gpu == gpu
    assert made.has_gpu == (gpu != "CPU")
    assert made.arch == {"NVIDIA H200": "sm_90", "NVIDIA B300": "sm_103", "CPU": ""}[gpu]


@pytest.mark.parametrize("nvml", [fake_nvml(no_driver=True), fake_nvml(gpus=0)], ids=["no driver", "no GPU"])
def test_no_nvidia_gpu(monkeypatch: pytest.MonkeyPatch, nvml: ModuleType):
    made = found(monkeypatch, "2.11.0+cu130", nvml=nvml)
    assert (made.gpu, made.vendor, made.arch, made.memory_mb, made.driver) == ("CPU", "cpu", "", 0, "")
    assert not made.has_gpu


def test_torch_that_cannot_drive_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Though there is one."""
    assert not found(monkeypatch, "2.13.0+cpu").has_gpu


def test_amd(monkeypatch: pytest.MonkeyPatch):
    made = found(monkeypatch, "2.11.0+rocm7.1")
    assert (made.gpu, made.vendor, made.arch) == ("AMD Instinct MI350X", "amd", "gfx950")
    assert (made.memory_mb, made.driver) == (294896, "6.14.14")
    assert sys.modules["amdsmi"].open == 0


def test_no_amd_gpu(monkeypatch: pytest.MonkeyPatch):
    assert not found(monkeypatch, "2.11.0+rocm7.1", gpus=0).has_gpu
    assert sys.modules["amdsmi"].open == 0


# ---- identity


def test_identity_of_a_gpu_is_not_its_host(monkeypatch: pytest.MonkeyPatch):
    made = found(monkeypatch, "2.11.0+cu130")
    assert set(made.identity()) == {"gpu", "vendor", "arch", "memory_mb", "driver", "versions"}


def test_identity_differs_by_driver_and_versions(monkeypatch: pytest.MonkeyPatch):
    one = found(monkeypatch, "2.11.0+cu130").identity()
    assert found(monkeypatch, "2.11.0+cu130").identity() == one
    assert found(monkeypatch, "2.11.0+cu130", nvml=fake_nvml(driver="580.65.06")).identity() != one
    assert found(monkeypatch, "2.12.0+cu130").identity() != one
    assert found(monkeypatch, "2.11.0+cu130", "1").identity() != one


def test_identity_of_a_cpu_names_it(monkeypatch: pytest.MonkeyPatch):
    made = found(monkeypatch, "2.11.0+cu130").without_gpu()
    assert (made.gpu, made.vendor, made.arch, made.memory_mb, made.driver) == ("CPU", "cpu", "", 0, "")
    assert not made.has_gpu
    assert {"cpu", "cores"} <= set(made.identity())


# ---- commit


@pytest.mark.parametrize(
    ("given", "expected"),
    [("0123abc", ("0123abc", "false")), ("0123abc-dirty", ("0123abc", "true"))],
)
def test_commit_that_was_given(monkeypatch: pytest.MonkeyPatch, given: str, expected: tuple[str, str]):
    monkeypatch.setenv("PI0EXP_COMMIT", given)
    assert machine.commit() == expected


def test_commit_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("PI0EXP_COMMIT", raising=False)
    (tmp_path / "pi0exp").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "pi0exp" / "machine.py"))
    assert machine.commit() == ("", "unknown")
    (tmp_path / ".git").mkdir()
    answers = {"rev-parse": "0123abc", "status": ""}
    monkeypatch.setattr(machine, "_git", lambda root, *words: answers[words[0]])
    assert machine.commit() == ("0123abc", "false")
    answers["status"] = " M pi0exp/machine.py"
    assert machine.commit() == ("0123abc", "true")


def test_commit_where_git_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Read from the files of the checkout; whether it was changed stays unknown."""
    monkeypatch.delenv("PI0EXP_COMMIT", raising=False)
    (tmp_path / "pi0exp").mkdir()
    (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "pi0exp" / "machine.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() == ("", "unknown")
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git" / "packed-refs").write_text("# pack-refs with: peeled\n0123abc refs/heads/main\n")
    assert machine.commit() == ("0123abc", "unknown")
    (tmp_path / ".git" / "refs" / "heads" / "main").write_text("456def\n")
    assert machine.commit() == ("456def", "unknown")
    (tmp_path / ".git" / "HEAD").write_text("789abc\n")
    assert machine.commit() == ("789abc", "unknown")


# ---- the environment

ELSEWHERE = {
    "experiments/observations/record_aloha.py",  # run by hand where a simulator is installed, not part of the package
}


def sources() -> dict[str, Path]:
    """Name within the package -> file, links followed."""
    found, package = {}, Path(pi0exp.__file__).parent
    for folder, folders, files in os.walk(package, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {Path(folder, f).relative_to(package).as_posix(): Path(folder, f) for f in files if f.endswith(".py")}
    return found


def test_environment_is_read_in_one_file():
    touches = re.compile(r"\b(environ|environb|getenv|putenv|unsetenv)\b")
    found = {name for name, file in sources().items() if touches.search(file.read_text())}
    assert {"model/pi0.py", "experiments/demo.py", "kernels/__init__.py"} <= set(sources())
    assert found - ELSEWHERE == {"machine.py"}
