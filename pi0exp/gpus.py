"""The GPUs that a process of this host may use, as the vendors' management libraries tell. Opens no GPU context."""

from dataclasses import dataclass, field
from typing import Any

from pi0exp.errors import UserError

ALL_AMD = "AMD"
"""Stands for all AMD GPUs of the host where AMD SMI cannot tell them apart as HIP does (before ROCm 6.4)."""


@dataclass(frozen=True)
class Gpu:
    """uuid: of the physical GPU, the same whoever asks. facts: fields of `pi0exp.machine.Machine`.

    pin: variables that leave a process this GPU only; empty where there is no other.
    """

    uuid: str
    facts: dict[str, Any] = field(default_factory=dict)
    pin: dict[str, str] = field(default_factory=dict)


def nvidia(visible: str | None) -> list[Gpu]:
    """Those that CUDA will see, in its order. visible: CUDA_VISIBLE_DEVICES, None where it is not set."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found: list[Gpu] = []
    try:
        count = pynvml.nvmlDeviceGetCount()
        words = map(str, range(count)) if visible is None else map(str.strip, visible.split(","))
        for word in words:
            if word in ("", "-1") or count == 0:
                break
            found.append(_nvidia(pynvml, word, alone=count == 1))
    except pynvml.NVMLError:
        pass  # CUDA_VISIBLE_DEVICES names a GPU that is not there; CUDA sees those before it
    finally:
        pynvml.nvmlShutdown()
    return found


def _nvidia(nvml: Any, word: str, alone: bool) -> Gpu:
    """word: an index or a UUID of CUDA_VISIBLE_DEVICES. alone: it is the only GPU of this host."""
    handle = nvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else nvml.nvmlDeviceGetHandleByUUID(word)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    facts = {
        "gpu": nvml.nvmlDeviceGetName(handle),
        "vendor": "nvidia",
        "arch": f"sm_{major}{minor}",
        "memory_mb": nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20,
        "driver": nvml.nvmlSystemGetDriverVersion(),
    }
    if word.startswith("MIG-"):  # a slice: its neighbours on the same GPU take power and bandwidth from it
        return Gpu(
            nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)), facts, _cuda(word)
        )
    uuid = nvml.nvmlDeviceGetUUID(handle)
    return Gpu(uuid, facts, {} if alone else _cuda(uuid))


def _cuda(word: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": word}


def amd(visible: dict[str, str]) -> list[Gpu]:
    """Those that HIP will see, in its order, by AMD SMI, which comes with ROCm.

    visible: of ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES those that are set; the later ones
    count what the first one leaves. Not run on AMD hardware; tested with answers of its form.
    """
    try:
        import amdsmi
    except (ImportError, KeyError, OSError) as error:  # without ROCm's library its import ends in a KeyError
        raise UserError(
            f"torch is built for ROCm, but AMD SMI cannot be imported ({error}): install the amdsmi of this ROCm"
        ) from error

    amdsmi.amdsmi_init()
    try:
        handles = amdsmi.amdsmi_get_processor_handles()
        try:
            numbered = [(amdsmi.amdsmi_get_gpu_enumeration_info(handle), handle) for handle in handles]
        except (AttributeError, amdsmi.AmdSmiException):
            return [Gpu(ALL_AMD, _amd_facts(amdsmi, handle)) for handle in handles[:1]]
        numbered.sort(key=lambda one: int(one[0]["hip_id"]))
        alone = len(numbered) == 1
        found = [Gpu(info["hip_uuid"], _amd_facts(amdsmi, handle)) for info, handle in numbered]
    finally:
        amdsmi.amdsmi_shut_down()
    found = _selected(found, visible.get("ROCR_VISIBLE_DEVICES"))
    outer = next((name for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if name in visible), None)
    if outer is not None:
        found = _selected(found, visible[outer])
    relative = {name: "0" for name in visible if name != "ROCR_VISIBLE_DEVICES"}
    pins = [{} if alone else {"ROCR_VISIBLE_DEVICES": one.uuid, **relative} for one in found]
    return [Gpu(one.uuid, one.facts, pin) for one, pin in zip(found, pins, strict=True)]


def _amd_facts(amdsmi: Any, handle: Any) -> dict[str, Any]:
    asic = amdsmi.amdsmi_get_gpu_asic_info(handle)
    return {
        "gpu": asic["market_name"],
        "vendor": "amd",
        "arch": asic["target_graphics_version"],
        "memory_mb": int(amdsmi.amdsmi_get_gpu_vram_info(handle)["vram_size"]),
        "driver": str(amdsmi.amdsmi_get_gpu_driver_info(handle)["driver_version"]),
    }


def _selected(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """What a list of indices and UUIDs leaves of them, up to the first that is not there; None leaves all."""
    if visible is None:
        return gpus
    named = {str(index): one for index, one in enumerate(gpus)} | {one.uuid: one for one in gpus}
    found: list[Gpu] = []
    for word in map(str.strip, visible.split(",")):
        if word not in named:
            break
        found.append(named[word])
    return found
