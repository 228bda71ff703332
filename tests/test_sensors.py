"""What is read of a GPU, from libraries that answer as NVML and AMD SMI do. No AMD GPU has run this."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_fakes import ADDRESS, UUID, fake_amdsmi, fake_nvml

from pi0exp import sensors
from pi0exp.sensors import AmdSmi, Nvml, SensorError, open_sensors


def nvml(patch: pytest.MonkeyPatch, **given: Any) -> Nvml:
    patch.setitem(sys.modules, "pynvml", fake_nvml(**given))
    return Nvml(UUID)


def amd(patch: pytest.MonkeyPatch, address: str | None = ADDRESS, **given: Any) -> AmdSmi:
    patch.setitem(sys.modules, "amdsmi", fake_amdsmi(**given))
    return AmdSmi(address)


# ---- NVML


def test_nvidia(monkeypatch: pytest.MonkeyPatch):
    made = nvml(monkeypatch)
    assert made.energy_j() == pytest.approx(123_456.789)
    assert (made.power_w(), made.power_kind) == (671.5, "momentary")
    assert made.power_limit_w() == 700
    assert made.temperature_c() == 61
    assert made.clocks_mhz() == {"sm": 1755, "memory": 3201}
    assert made.throttle() == ["power cap", "thermal"]
    assert made.processes() == {4711: "512 MiB", 4712: "memory not told"}


def test_driver_without_momentary_power_gives_the_mean_of_a_second(monkeypatch: pytest.MonkeyPatch):
    for given in ({"momentary": False}, {"nvmlDeviceGetFieldValues": "Not Supported"}):
        made = nvml(monkeypatch, **given)
        assert (made.power_w(), made.power_kind) == (650.4, "mean of a second")


def test_idle_is_no_throttling(monkeypatch: pytest.MonkeyPatch):
    made = nvml(monkeypatch)
    monkeypatch.setattr(made._nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda handle: 1)
    assert made.throttle() == []


def test_throttle_reasons_are_those_of_nvml():
    """Bits as the binding has them, of whichever spelling it knows."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    names = ("ApplicationsClocksSetting", "SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown")
    names += ("HwThermalSlowdown", "HwPowerBrakeSlowdown", "DisplayClockSetting")
    assert {getattr(pynvml, f"nvmlClocksThrottleReason{name}") for name in names} == set(sensors._NVML_REASONS)
    assert pynvml.nvmlClocksThrottleReasonGpuIdle not in sensors._NVML_REASONS


def test_calls_of_nvml_are_there():
    """Of the fake's calls and constants, each is one of nvidia-ml-py."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    fake = fake_nvml()
    own = [name for name in vars(fake) if name.lower().startswith("nvml")]
    assert len(own) > 12
    assert [name for name in own if not hasattr(pynvml, name)] == []
    constants = [name for name in own if name.startswith("NVML_")]
    assert {name: getattr(pynvml, name) for name in constants} == {name: getattr(fake, name) for name in constants}


@pytest.mark.parametrize(
    ("call", "question"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_j"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit_w"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetClockInfo", "clocks_mhz"),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", "throttle"),
        ("nvmlDeviceGetComputeRunningProcesses", "processes"),
    ],
)
def test_what_nvml_does_not_tell_is_an_error_with_its_reason(monkeypatch, call: str, question: str):
    made = nvml(monkeypatch, **{call: "Not Supported"})
    with pytest.raises(SensorError, match=r"NVML: .+: Not Supported"):
        getattr(made, question)()


def test_gpu_that_nvml_does_not_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    with pytest.raises(SensorError, match="GPU-other: Not Found"):
        Nvml("GPU-other")
    with pytest.raises(SensorError, match="Driver Not Loaded"):
        nvml(monkeypatch, nvmlInit="Driver Not Loaded")


def test_zero_is_no_answer(monkeypatch: pytest.MonkeyPatch):
    made = nvml(monkeypatch)
    monkeypatch.setattr(made._nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 0)
    with pytest.raises(SensorError, match="the energy counter reads 0"):
        made.energy_j()


# ---- AMD SMI


def test_amd(monkeypatch: pytest.MonkeyPatch):
    made = amd(monkeypatch)
    assert made.energy_j() == pytest.approx(8e9 * 15.259e-6)
    assert (made.power_w(), made.power_kind) == (812, "of the socket")
    assert made.power_limit_w() == 1000
    assert made.temperature_c() == 67
    assert made.clocks_mhz() == {"sm": 2100, "memory": 2000}
    assert made.throttle() == ["power cap"]
    assert made.processes() == {815: "python3, 3072 MiB"}


@pytest.mark.parametrize(
    ("info", "watts"),
    [
        ({"current_socket_power": "N/A", "average_socket_power": 420}, 420),  # MI200
        ({"current_socket_power": 65535, "average_socket_power": 2**32 - 1, "socket_power": 333}, 333),
        ({"current_socket_power": 0, "average_socket_power": 410}, 410),
    ],
)
def test_power_of_other_generations(monkeypatch: pytest.MonkeyPatch, info: dict, watts: float):
    assert amd(monkeypatch, power_info=info).power_w() == watts


def test_missing_power_is_no_zero(monkeypatch: pytest.MonkeyPatch):
    made = amd(monkeypatch, power_info={"current_socket_power": "N/A", "average_socket_power": "N/A"})
    with pytest.raises(SensorError, match="no power in"):
        made.power_w()


@pytest.mark.parametrize("status", [{}, {"active_ppt_pwr": "N/A", "active_socket_thrm": "N/A"}])
def test_throttle_reasons_that_are_not_told_are_not_none(monkeypatch: pytest.MonkeyPatch, status: dict):
    with pytest.raises(SensorError, match="no throttle reason in"):
        amd(monkeypatch, violation_status=status).throttle()


def test_gpu_that_is_not_held_down(monkeypatch: pytest.MonkeyPatch):
    status = {"active_ppt_pwr": False, "active_socket_thrm": 0, "active_hbm_thrm": "N/A"}
    assert amd(monkeypatch, violation_status=status).throttle() == []


def test_counter_of_older_wheels(monkeypatch: pytest.MonkeyPatch):
    made = amd(monkeypatch, energy_count={"power": 1_000_000, "counter_resolution": 15.3, "timestamp": 1})
    assert made.energy_j() == pytest.approx(15.3)


def test_cap_in_watts(monkeypatch: pytest.MonkeyPatch):
    assert amd(monkeypatch, power_cap_info={"power_cap": 750}).power_limit_w() == 750


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("energy_count", "energy_j"),
        ("power_info", "power_w"),
        ("power_cap_info", "power_limit_w"),
        ("temp_metric", "temperature_c"),
        ("violation_status", "throttle"),
        ("gpu_process_list", "processes"),
    ],
)
def test_what_amd_smi_does_not_tell_is_an_error_with_its_reason(monkeypatch, name: str, question: str):
    made = amd(monkeypatch, **{name: Exception})
    with pytest.raises(SensorError, match=r"AMD SMI: .+: AMDSMI_STATUS_NOT_SUPPORTED"):
        getattr(made, question)()


@pytest.mark.parametrize(
    "answer", [{"energy_accumulator": 0, "counter_resolution": 15.3}, {"counter_resolution": 15.3}]
)
def test_counter_of_a_virtual_machine(monkeypatch: pytest.MonkeyPatch, answer: dict):
    with pytest.raises(SensorError, match="the energy counter reads"):
        amd(monkeypatch, energy_count=answer).energy_j()


def test_clock_that_is_not_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SensorError, match="the sm clock reads 'N/A'"):
        amd(monkeypatch, clocks={"GFX": {"clk": "N/A"}}).clocks_mhz()


def test_amd_without_an_address_takes_the_only_gpu(monkeypatch: pytest.MonkeyPatch):
    assert amd(monkeypatch, address=None).temperature_c() == 67
    with pytest.raises(SensorError, match="8 GPUs, and this torch does not tell"):
        amd(monkeypatch, address=None, handles=8)


def test_amd_smi_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    with pytest.raises(SensorError, match="AMD SMI cannot be imported"):
        AmdSmi(ADDRESS)


# ---- which GPU


def test_gpu_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.setitem(sys.modules, "amdsmi", fake_amdsmi())
    facts = SimpleNamespace(uuid=UUID.removeprefix("GPU-"), pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    device = torch.device("cuda", 0)
    assert isinstance(open_sensors(device), Nvml)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert open_sensors(device).temperature_c() == 67
    facts.pci_bus_id = 0x1C
    with pytest.raises(SensorError, match=r"0000:1c:00\.0: AMDSMI_STATUS_NOT_FOUND"):
        open_sensors(device)
