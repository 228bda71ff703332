"""What a GPU tells of itself while it works: energy, power, clocks, temperature, why it slows down, who else is on it.

By the vendors' own Python bindings of their management libraries, nvidia-ml-py (NVML) and amdsmi (AMD SMI), which
`pi0exp.machine` needs anyway. Whatever a GPU, its driver or a virtual machine does not tell is a `SensorError` with the
reason, never a zero.

AMD SMI has not been run on AMD hardware here; the tests replay answers of the form that amdsmi 7.0.2 documents.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class SensorError(Exception):
    """This GPU does not tell that; why."""


class Sensors(Protocol):
    """One GPU. Each method raises SensorError where there is no answer."""

    @property
    def power_kind(self) -> str:
        """What a power reading is: momentary, or a mean over some time."""
        ...

    def energy_j(self) -> float:
        """Joules since some moment in the past; the counter moves in steps of tens of milliseconds."""
        ...

    def power_w(self) -> float: ...
    def power_limit_w(self) -> float: ...
    def temperature_c(self) -> float: ...
    def clocks_mhz(self) -> dict[str, float]:
        """Of the multiprocessors ("sm") and of the memory ("memory")."""
        ...

    def throttle(self) -> list[str]:
        """Why the clocks are held down at this moment; empty where they are not."""
        ...

    def processes(self) -> dict[int, str]:
        """Process id -> a few words, of all that compute on this GPU. The ids are those of the host."""
        ...


def open_sensors(device: torch.device) -> Sensors:
    """The sensors of the GPU that torch uses, found by its UUID or PCI address, whatever is made visible."""
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        address = (getattr(facts, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
        known = [part for part in address if part is not None]
        return AmdSmi("{:04x}:{:02x}:{:02x}.0".format(*known) if len(known) == 3 else None)
    return Nvml(f"GPU-{facts.uuid}")


def positive(value: Any, what: str) -> float:
    """A number above zero. AMD SMI says "N/A" for what there is not, its older versions the largest unsigned number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or value in _UNKNOWN:
        raise SensorError(f"{what} reads {value!r}")
    return float(value)


_UNKNOWN = {2**16 - 1, 2**32 - 1, 2**64 - 1}


class Nvml:
    """NVIDIA's management library. Source of the calls: NVML API reference, through nvidia-ml-py.

    Power is momentary where the driver has that field; NVML's plain reading is a mean over one second from Ampere on.
    """

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml = pynvml
        self._ask("GPU", pynvml.nvmlInit)
        self._handle = self._ask(uuid, lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid))
        self._momentary = self._momentary_w() is not None

    @property
    def power_kind(self) -> str:
        return "momentary" if self._momentary else "mean of a second"

    def energy_j(self) -> float:
        millijoules = self._ask("energy", lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return positive(millijoules, "the energy counter") / 1e3

    def power_w(self) -> float:
        if self._momentary:
            return positive(self._momentary_w(), "power")
        return positive(self._ask("power", lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle)), "power") / 1e3

    def power_limit_w(self) -> float:
        milliwatts = self._ask("power limit", lambda: self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle))
        return positive(milliwatts, "the power limit") / 1e3

    def temperature_c(self) -> float:
        read = self._nvml.nvmlDeviceGetTemperature
        return float(self._ask("temperature", lambda: read(self._handle, self._nvml.NVML_TEMPERATURE_GPU)))

    def clocks_mhz(self) -> dict[str, float]:
        kinds = {"sm": self._nvml.NVML_CLOCK_SM, "memory": self._nvml.NVML_CLOCK_MEM}
        read = partial(self._nvml.nvmlDeviceGetClockInfo, self._handle)
        return {name: float(self._ask("clocks", partial(read, kind))) for name, kind in kinds.items()}

    def throttle(self) -> list[str]:
        bits = self._ask("throttle reasons", lambda: self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
        return [words for bit, words in _NVML_REASONS.items() if bits & bit]

    def processes(self) -> dict[int, str]:
        found = self._ask("processes", lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        return {one.pid: self._memory(one.usedGpuMemory) for one in found}

    @staticmethod
    def _memory(used: int | None) -> str:
        """Of a process; drivers tell it of none that is in another container."""
        return "memory not told" if used is None else f"{used // 2**20} MiB"

    def _momentary_w(self) -> float | None:
        """Watts at this moment; None where this driver or GPU has no such field."""
        try:
            [field] = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])
        except self._nvml.NVMLError:
            return None
        return field.value.uiVal / 1e3 if field.nvmlReturn == 0 else None

    def _ask(self, what: str, question: Callable[[], T]) -> T:
        try:
            return question()
        except self._nvml.NVMLError as error:
            raise SensorError(f"NVML: {what}: {error}") from error


_NVML_REASONS = {
    0x2: "clocks set by a user",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal",
    0x40: "thermal, by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
"""nvmlClocksEventReasons of nvml.h; an idle GPU (0x1) is not held down."""


class AmdSmi:
    """AMD's management library. address: PCI, as 0000:1b:00.0; None where torch does not tell it."""

    def __init__(self, address: str | None) -> None:
        try:
            import amdsmi
        except (ImportError, KeyError, OSError) as error:  # without ROCm's library its import ends in a KeyError
            raise SensorError(f"AMD SMI cannot be imported: {error}") from error
        self._smi = amdsmi
        self._ask("GPU", amdsmi.amdsmi_init)
        if address is not None:
            self._handle = self._ask(address, lambda: amdsmi.amdsmi_get_processor_handle_from_bdf(address))
            return
        handles = self._ask("GPUs", amdsmi.amdsmi_get_processor_handles)
        if len(handles) != 1:  # its order is not that of HIP
            raise SensorError(
                f"AMD SMI: {len(handles)} GPUs, and this torch does not tell the address of the one it uses"
            )
        self._handle = handles[0]

    @property
    def power_kind(self) -> str:
        return "of the socket"

    def energy_j(self) -> float:
        answer = self._ask("energy", lambda: self._smi.amdsmi_get_energy_count(self._handle))
        ticks = answer.get("energy_accumulator", answer.get("power"))  # its name up to 6.2.1
        resolution = positive(answer.get("counter_resolution"), "the energy counter's resolution")
        return positive(ticks, "the energy counter") * resolution * 1e-6  # microjoules a tick

    def power_w(self) -> float:
        answer = self._ask("power", lambda: self._smi.amdsmi_get_power_info(self._handle))
        for name in (
            "current_socket_power",
            "average_socket_power",
            "socket_power",
        ):  # MI300 and later; MI200 and before
            try:
                return positive(answer.get(name), name)
            except SensorError:
                continue
        raise SensorError(f"AMD SMI: no power in {answer}")

    def power_limit_w(self) -> float:
        answer = self._ask("power limit", lambda: self._smi.amdsmi_get_power_cap_info(self._handle))
        cap = positive(answer.get("power_cap"), "the power limit")
        return cap / 1e6 if cap > _WATTS_AT_MOST else cap  # microwatts in the releases that document a unit

    def temperature_c(self) -> float:
        kind, metric = self._smi.AmdSmiTemperatureType.JUNCTION, self._smi.AmdSmiTemperatureMetric.CURRENT
        return float(self._ask("temperature", lambda: self._smi.amdsmi_get_temp_metric(self._handle, kind, metric)))

    def clocks_mhz(self) -> dict[str, float]:
        kinds = {"sm": self._smi.AmdSmiClkType.GFX, "memory": self._smi.AmdSmiClkType.MEM}
        read = partial(self._smi.amdsmi_get_clock_info, self._handle)
        answers = {name: self._ask("clocks", partial(read, kind)) for name, kind in kinds.items()}
        return {name: positive(answer.get("clk"), f"the {name} clock") for name, answer in answers.items()}

    def throttle(self) -> list[str]:
        answer = self._ask("throttle reasons", lambda: self._smi.amdsmi_get_violation_status(self._handle))
        told = {name: answer[name] for name in _SMI_REASONS if answer.get(name) in (False, True)}
        if not told:  # not the same as not held down
            raise SensorError(f"AMD SMI: no throttle reason in {answer}")
        return [words for name, words in _SMI_REASONS.items() if told.get(name)]

    def processes(self) -> dict[int, str]:
        found = self._ask("processes", lambda: self._smi.amdsmi_get_gpu_process_list(self._handle))
        return {one["pid"]: f"{one['name']}, {one['memory_usage']['vram_mem'] // 2**20} MiB" for one in found}

    def _ask(self, what: str, question: Callable[[], T]) -> T:
        try:
            return question()
        except self._smi.AmdSmiException as error:
            raise SensorError(f"AMD SMI: {what}: {error}") from error


_WATTS_AT_MOST = 100_000
_SMI_REASONS = {
    "active_ppt_pwr": "power cap",
    "active_socket_thrm": "thermal",
    "active_vr_thrm": "thermal, voltage regulator",
    "active_hbm_thrm": "thermal, memory",
    "active_prochot_thrm": "thermal, by hardware",
}
"""Fields of amdsmi_get_violation_status; "N/A" where the GPU does not tell."""
