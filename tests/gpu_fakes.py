"""Management libraries and sensors that answer as the real ones do, for tests without a GPU."""

from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

from pi0exp.sensors import SensorError

UUID = "GPU-4fa23c4e-2e34-1c39-a8a9-5f0f5e3b1a11"
ADDRESS = "0000:1b:00.0"


def fake_nvml(momentary: bool = True, **missing: str) -> ModuleType:
    """pynvml on an H200 under load. missing: name of a call -> the error that it raises."""
    module: Any = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def answer(name: str, value: Any) -> None:
        def call(*args: Any) -> Any:
            if name in missing:
                raise NVMLError(missing[name])
            return value(*args) if callable(value) else value

        setattr(module, name, call)

    def by_uuid(uuid: str) -> str:
        if uuid != UUID:
            raise NVMLError("Not Found")
        return "handle"

    module.NVMLError = NVMLError
    module.NVML_TEMPERATURE_GPU, module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM = 0, 1, 2
    module.NVML_FI_DEV_POWER_INSTANT = 186
    answer("nvmlInit", None)
    answer("nvmlDeviceGetHandleByUUID", by_uuid)
    answer("nvmlDeviceGetTotalEnergyConsumption", 123_456_789)
    answer("nvmlDeviceGetPowerUsage", 650_400)
    answer("nvmlDeviceGetEnforcedPowerLimit", 700_000)
    answer("nvmlDeviceGetTemperature", 61)
    answer("nvmlDeviceGetClockInfo", lambda handle, kind: {1: 1755, 2: 3201}[kind])
    answer("nvmlDeviceGetCurrentClocksThrottleReasons", 0x4 | 0x20)
    process = SimpleNamespace(pid=4711, usedGpuMemory=512 * 2**20)
    answer("nvmlDeviceGetComputeRunningProcesses", [process, SimpleNamespace(pid=4712, usedGpuMemory=None)])
    field = SimpleNamespace(nvmlReturn=0 if momentary else 3, value=SimpleNamespace(uiVal=671_500))
    answer("nvmlDeviceGetFieldValues", [field])
    return module


def fake_amdsmi(handles: int = 1, **answers: Any) -> ModuleType:
    """amdsmi on an MI350X. answers: name of a call without amdsmi_get_ -> another answer, or an error to raise."""
    module: Any = ModuleType("amdsmi")

    class AmdSmiException(Exception):  # noqa: N818  (its name in amdsmi)
        pass

    def bdf(address: str) -> str:
        if address != ADDRESS:
            raise AmdSmiException("AMDSMI_STATUS_NOT_FOUND")
        return "handle"

    # Recorded from the documentation of amdsmi 7.0.2: names, units and "N/A" are its own.
    usual = {
        "energy_count": {"energy_accumulator": 8_000_000_000, "counter_resolution": 15.259, "timestamp": 1_700_000_000},
        "power_info": {
            "socket_power": 0,
            "current_socket_power": 812,
            "average_socket_power": "N/A",
            "gfx_voltage": 765,
            "soc_voltage": "N/A",
            "mem_voltage": "N/A",
            "power_limit": 1_000_000_000,
        },
        "power_cap_info": {"power_cap": 1_000_000_000, "min_power_cap": 0, "max_power_cap": 1_000_000_000},
        "temp_metric": 67,
        "violation_status": {"active_ppt_pwr": True, "active_socket_thrm": False, "active_vr_thrm": "N/A"},
        "gpu_process_list": [{"name": "python3", "pid": 815, "memory_usage": {"vram_mem": 3 * 2**30}}],
    }

    def ask(name: str) -> Any:
        def call(handle: str, *args: Any) -> Any:
            assert handle == "handle"
            found = answers.get(name, usual[name])
            if found is Exception:
                raise AmdSmiException("AMDSMI_STATUS_NOT_SUPPORTED")
            return found

        return call

    for name in usual:
        setattr(module, f"amdsmi_get_{name}", ask(name))
    clocks = {"GFX": {"clk": 2100, "min_clk": 132, "max_clk": 2200}, "MEM": {"clk": 2000}} | answers.get("clocks", {})
    module.AmdSmiClkType = IntEnum("AmdSmiClkType", ["GFX", "MEM"])
    module.AmdSmiTemperatureType = IntEnum("AmdSmiTemperatureType", ["JUNCTION"])
    module.AmdSmiTemperatureMetric = IntEnum("AmdSmiTemperatureMetric", ["CURRENT"])
    module.AmdSmiException = AmdSmiException
    module.amdsmi_get_clock_info = lambda handle, kind: clocks[kind.name]
    module.amdsmi_init = lambda: None
    module.amdsmi_get_processor_handle_from_bdf = bdf
    module.amdsmi_get_processor_handles = lambda: ["handle"] * handles
    return module


class FakeSensors:
    """A GPU that draws `watts`; its counter moves every `step_s` and has run since second 0 of the clock."""

    power_kind = "momentary"

    def __init__(self, clock: Any, watts: float = 500.0, step_s: float = 0.1, **missing: str) -> None:
        self.clock, self.watts, self.step_s, self.missing = clock, watts, step_s, missing

    def _check(self, name: str) -> None:
        if name in self.missing:
            raise SensorError(self.missing[name])

    def energy_j(self) -> float:
        self._check("energy_j")
        return self.watts * (self.clock() // self.step_s) * self.step_s

    def power_w(self) -> float:
        self._check("power_w")
        return self.watts

    def power_limit_w(self) -> float:
        self._check("power_limit_w")
        return 700.0

    def temperature_c(self) -> float:
        self._check("temperature_c")
        return 55.0

    def clocks_mhz(self) -> dict[str, float]:
        self._check("clocks_mhz")
        return {"sm": 1755.0, "memory": 3201.0}

    def throttle(self) -> list[str]:
        self._check("throttle")
        return ["power cap"]

    def processes(self) -> dict[int, str]:
        self._check("processes")
        return {1: "100 MiB"}
