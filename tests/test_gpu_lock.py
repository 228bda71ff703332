"""One measurement at a time on each GPU: with processes of their own, killed ones among them, on pretended GPUs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from cli import REPOSITORY, TESTS, environment, heed_signals

from pi0exp import gpu_lock, gpus, interrupts, isolate, machine
from pi0exp.errors import UserError
from pi0exp.gpus import Gpu
from pi0exp.machine import Machine
from pi0exp.measure import fingerprint

A, B = "GPU-4fa23c4e-2e34-1c39-a8a9-5f0f5e3b1a11", "GPU-9a5d1c02-77d1-6c1b-9a1e-0c2f6f2d7b22"
H200 = {"gpu": "NVIDIA H200", "vendor": "nvidia"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Locks of this test only; two equal GPUs are visible."""
    found = tmp_path / "locks"
    monkeypatch.setenv("PI0EXP_GPU_LOCKS", str(found))
    monkeypatch.delenv("PI0EXP_GPU", raising=False)
    see(monkeypatch, *(Gpu(uuid, H200, {"CUDA_VISIBLE_DEVICES": uuid}) for uuid in (A, B)))
    return found


def see(monkeypatch, *visible: Gpu) -> None:
    monkeypatch.setattr(gpu_lock, "visible_gpus", lambda: list(visible))


def parent(tmp_path: Path, log: Path, gpus: str, points: int = 1, child: str = "lock_child") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "lock_parent.py"), str(log), gpus, str(points), child],
        cwd=REPOSITORY,
        env=environment(tmp_path)
        | {"PYTHONPATH": f"{TESTS}{os.pathsep}{REPOSITORY}", "PI0EXP_GPU_LOCKS": str(tmp_path / "locks")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_signals,
    )


def free(folder: Path, uuid: str) -> bool:
    """Whether the GPU could be taken now."""
    if (descriptor := gpu_lock._lock(folder / f"{uuid}.lock")) is not None:
        os.close(descriptor)
    return descriptor is not None


# ---- which GPU


def test_a_free_gpu_is_taken_and_pinned(folder):
    told: list[str] = []
    with gpu_lock.taken(True, told.append) as first, gpu_lock.taken(True, told.append) as second:
        assert (first.uuid, second.uuid) == (A, B)
        assert second.environment == {"CUDA_VISIBLE_DEVICES": B, "PI0EXP_GPU": B}
        assert not free(folder, A)
        assert not free(folder, B)
    assert free(folder, A)
    assert free(folder, B)
    assert told == []


def test_all_taken_is_told_once_and_waited_for(folder):
    told: list[str] = []
    release, order = threading.Event(), []

    def second() -> None:
        with gpu_lock.taken(True, lambda text: (told.append(text), release.set())) as gpu:
            order.append(gpu.uuid)

    with gpu_lock.taken(True, told.append), gpu_lock.taken(True, told.append):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert release.wait(20)
        time.sleep(3 * gpu_lock.POLL_S)
        assert order == []
    waiting.join(20)
    by = f"is taken by process {os.getpid()}"
    assert told == [f"waits for a GPU: {A} {by}, {B} {by}"]
    assert order in ([A], [B])


def test_only_gpus_like_the_first_take_turns(folder, monkeypatch):
    see(monkeypatch, Gpu(A, H200), Gpu(B, H200 | {"gpu": "NVIDIA T400"}))
    asked: list[list[str]] = []
    real = gpu_lock._first_free
    monkeypatch.setattr(
        gpu_lock, "_first_free", lambda some, tell: (asked.append([one.uuid for one in some]), real(some, tell))[1]
    )
    with gpu_lock.taken(True, print):
        assert asked == [[A]]


def test_nothing_is_taken_for_the_cpu_or_twice(folder, monkeypatch):
    with gpu_lock.taken(False, print) as none:
        assert none == gpu_lock.Taken()
    monkeypatch.setenv("PI0EXP_GPU", A)  # by whoever started this process
    with gpu_lock.taken(True, print) as none, gpu_lock.taken_here(True, print):
        assert none == gpu_lock.Taken()
    assert not folder.exists()


def test_a_command_sees_only_the_gpu_that_it_took(folder):
    with gpu_lock.taken_here(True, print):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == A
        assert machine.held_gpu() == A
        assert fingerprint(Machine("NVIDIA H200", "nvidia"))["gpu_uuid"] == A
        assert "gpu_uuid" not in fingerprint(Machine())
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert machine.held_gpu() is None


def test_a_signal_ends_the_wait(folder, monkeypatch):
    see(monkeypatch, Gpu(A, H200))
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    interrupts.install()
    try:
        with gpu_lock.taken(True, print):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"), interrupts.held(), gpu_lock.taken(True, print):
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- files of the locks


def test_a_lock_needs_no_right_to_write(folder, monkeypatch):
    """A file that another user made may be read only; tests may run as root, so opening it for writing is refused."""
    with gpu_lock.taken(True, print):
        pass
    real = os.open

    def no_writing(path: Any, flags: int, *more: Any, **given: Any) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more, **given)

    monkeypatch.setattr(os, "open", no_writing)
    with gpu_lock.taken(True, print) as gpu:
        assert gpu.uuid == A
        assert not free(folder, A)


def test_all_users_may_make_locks(folder):
    with gpu_lock.taken(True, print):
        assert folder.stat().st_mode & 0o7777 == 0o1777
        assert (folder / f"{A}.lock").stat().st_mode & 0o777 == 0o666


def test_a_lock_whose_file_was_removed_is_none(folder, monkeypatch):
    """Between opening and locking: the lock of a file without a name would keep nobody away."""
    with gpu_lock.taken(True, print):
        pass
    real = gpu_lock.fcntl.flock

    def remove(descriptor: int, how: int) -> None:
        real(descriptor, how)
        (folder / f"{A}.lock").unlink()

    monkeypatch.setattr(gpu_lock, "fcntl", SimpleNamespace(flock=remove, LOCK_EX=2, LOCK_NB=4))
    assert gpu_lock._lock(folder / f"{A}.lock") is None


def test_no_place_for_locks_is_one_line(tmp_path, folder, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PI0EXP_GPU_LOCKS", str(tmp_path / "file"))
    with pytest.raises(UserError, match="PI0EXP_GPU_LOCKS names another folder"), gpu_lock.taken(True, print):
        pass


# ---- processes


def test_processes_take_turns(tmp_path, folder):
    log = tmp_path / "log"
    some = [parent(tmp_path, log, f"{A},{B}", points=3) for _ in range(3)]
    told = [process.communicate(timeout=120)[0] for process in some]
    assert [text.count("error") for text in told] == [3, 3, 3], told
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 9
    assert all(line["gpu"] == line["visible"] for line in lines)
    assert {line["gpu"] for line in lines} == {A, B}
    for uuid in (A, B):
        times = sorted((line["begin"], line["end"]) for line in lines if line["gpu"] == uuid)
        assert all(first[1] <= second[0] for first, second in pairwise(times)), times


@pytest.mark.parametrize("guard_too", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lock_outlives_its_killed_parent_while_the_child_runs(tmp_path, folder, guard_too):
    log = tmp_path / "stubborn"
    process = parent(tmp_path, log, A)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = psutil.Process(json.loads(log.read_text())["pid"])
    guard = child.parent()
    assert guard is not None
    assert not free(folder, A)
    process.kill()
    process.wait(10)
    if not guard_too:
        assert child.is_running(), "it does not hear SIGTERM, and SIGKILL comes some seconds later"
        assert not free(folder, A)
        assert child.is_running()
    else:
        guard.kill()
    psutil.wait_procs([child, guard], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    while not free(folder, A):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_wait_is_not_part_of_the_time_of_a_point(tmp_path, folder, monkeypatch):
    """The clock of the point stands still: it waits for longer than it may take."""
    see(monkeypatch, Gpu(A, H200, {"CUDA_VISIBLE_DEVICES": A}))
    monkeypatch.setattr(isolate, "CHILD", "lock_child")
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{REPOSITORY}")
    told: list[str] = []
    limit_s, descriptor = 8.0, gpu_lock._first_free([Gpu(A)], print)[1]
    threading.Timer(limit_s + 1, os.close, (descriptor,)).start()
    began = time.monotonic()
    result = isolate.measure_isolated({"log": str(tmp_path / "log")}, limit_s, told.append, on_gpu=True)
    assert result.reasons == ["measures nothing"], result
    assert told == [f"waits for a GPU: {A} is taken by process {os.getpid()}"]
    assert time.monotonic() - began > limit_s


def test_a_child_that_died_is_told_with_its_gpu(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(isolate, "CHILD", "no_such_module")
    monkeypatch.setattr(isolate, "this_machine", lambda: Machine("NVIDIA H200", "nvidia"))
    result = isolate.measure_isolated({}, 60, print, on_gpu=True)
    assert result.outcome == "error"
    assert result.fingerprint["gpu_uuid"] == A


# ---- what is visible


def fake_nvml(count: int) -> ModuleType:
    """pynvml on a machine with equal GPUs, the first of them cut into slices."""
    module: Any = ModuleType("pynvml")
    uuids = [A, B][:count]

    class NVMLError(Exception):
        pass

    def by_uuid(uuid: str) -> Any:
        if uuid not in (*uuids, "MIG-1"):
            raise NVMLError("Not Found")
        return uuid

    module.NVMLError, module.nvmlInit, module.nvmlShutdown = NVMLError, lambda: None, lambda: None
    module.nvmlDeviceGetCount = lambda: count
    module.nvmlDeviceGetHandleByIndex = lambda index: by_uuid(uuids[index] if index < count else "")
    module.nvmlDeviceGetHandleByUUID = by_uuid
    module.nvmlDeviceGetUUID = lambda handle: handle
    module.nvmlDeviceGetDeviceHandleFromMigDeviceHandle = lambda handle: A
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: (9, 0)
    module.nvmlDeviceGetName = lambda handle: "NVIDIA H200"
    module.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=2**37)
    module.nvmlSystemGetDriverVersion = lambda: "580.1"
    return module


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (1, None, [(A, {})]),
        (2, None, [(A, {"CUDA_VISIBLE_DEVICES": A}), (B, {"CUDA_VISIBLE_DEVICES": B})]),
        (2, "1", [(B, {"CUDA_VISIBLE_DEVICES": B})]),
        (2, f"{B},0", [(B, {"CUDA_VISIBLE_DEVICES": B}), (A, {"CUDA_VISIBLE_DEVICES": A})]),
        (2, "1,7,0", [(B, {"CUDA_VISIBLE_DEVICES": B})]),
        (2, "-1", []),
        (1, "MIG-1", [(A, {"CUDA_VISIBLE_DEVICES": "MIG-1"})]),
    ],
)
def test_visible_gpus_of_nvidia(monkeypatch, count, visible, expected):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(count))
    assert [(gpu.uuid, gpu.pin) for gpu in gpus.nvidia(visible)] == expected


def test_identity_is_that_of_any_of_equal_gpus(monkeypatch):
    monkeypatch.setattr(machine, "_version", lambda name: "2.11.0+cu130" if name == "torch" else "")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(2))
    found = []
    for visible in ("0", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found.append(machine.this_machine.__wrapped__().identity())
    assert found[0] == found[1]
    assert found[0]["gpu"] == "NVIDIA H200"


def fake_amdsmi(*hip_ids: int) -> ModuleType:
    """amdsmi on a machine with MI350Xs, whose order is not that of HIP. No ids: a version that does not tell them."""
    module: Any = ModuleType("amdsmi")
    module.AmdSmiException = type("AmdSmiException", (Exception,), {})
    module.amdsmi_init = module.amdsmi_shut_down = lambda: None
    module.amdsmi_get_processor_handles = lambda: list(range(max(2, len(hip_ids))) if len(hip_ids) != 1 else [0])
    module.amdsmi_get_gpu_asic_info = lambda handle: {"market_name": "MI350X", "target_graphics_version": "gfx950"}
    module.amdsmi_get_gpu_vram_info = lambda handle: {"vram_size": 294896}
    module.amdsmi_get_gpu_driver_info = lambda handle: {"driver_version": "6.14.14"}
    if hip_ids:
        module.amdsmi_get_gpu_enumeration_info = lambda handle: {
            "drm_render": 128 + handle,
            "hip_id": hip_ids[handle],
            "hip_uuid": f"GPU-{hip_ids[handle]}",
        }
    return module


def rocr(number: int, **more: str) -> tuple[str, dict[str, str]]:
    return f"GPU-{number}", {"ROCR_VISIBLE_DEVICES": f"GPU-{number}", **more}


@pytest.mark.parametrize(
    ("ids", "visible", "expected"),
    [
        ((0,), {}, [("GPU-0", {})]),
        ((1, 0), {}, [rocr(0), rocr(1)]),
        ((2, 0, 1), {"ROCR_VISIBLE_DEVICES": "2,GPU-0"}, [rocr(2), rocr(0)]),
        (
            (2, 0, 1),
            {"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"},
            [rocr(2, HIP_VISIBLE_DEVICES="0")],
        ),
        ((1, 0), {"CUDA_VISIBLE_DEVICES": "1"}, [rocr(1, CUDA_VISIBLE_DEVICES="0")]),
        ((1, 0), {"ROCR_VISIBLE_DEVICES": ""}, []),
        ((), {}, [(gpus.ALL_AMD, {})]),
    ],
)
def test_visible_gpus_of_amd(monkeypatch, ids, visible, expected):
    monkeypatch.setitem(sys.modules, "amdsmi", fake_amdsmi(*ids))
    assert [(gpu.uuid, gpu.pin) for gpu in gpus.amd(visible)] == expected
