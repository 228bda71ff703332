"""What a GPU reaches is measured once, kept by machine, and measured again where it is old or asked for."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pi0exp import ceilings, ceilings_file, rates
from pi0exp.ceilings import main, reached, table
from pi0exp.ceilings_file import FRESH, CeilingsFile, Rate, fresh
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.rates import lacking

GPU = torch.device("cuda", 0)
H200 = Machine("NVIDIA H200", "nvidia", "sm_90", 143771, "580.1", versions={"torch": "2.11.0", "python": "3.12"})
OWNER = {"gpu": "NVIDIA H200", "uuid": "1", "power_limit_w": 700.0}


def rate(burst: float = 4e12, age: timedelta = timedelta(0)) -> Rate:
    return Rate(burst, 0.8 * burst, (datetime.now(UTC) - age).isoformat(timespec="seconds"))


@pytest.fixture
def file(tmp_path: Path) -> CeilingsFile:
    return CeilingsFile(tmp_path / "mlruns" / "ceilings.json")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rates are given instead of measured; the names of those that were asked for."""
    asked: list[str] = []

    def measure(kind: str, device: torch.device, seconds: float) -> Rate:
        asked.append(kind)
        return rate(1e12 * len(asked))

    monkeypatch.setattr(ceilings, "measure_rate", measure)
    monkeypatch.setattr(rates, "measure_rate", measure)
    return asked


# ---- the file


def test_rates_come_back_as_they_were_kept(file: CeilingsFile):
    assert file.rates(OWNER) == {}
    copy, bf16 = rate(4e12), rate(9e14)
    file.keep(OWNER, {"copy": copy, "bf16": rate(8e14)})
    file.keep(OWNER, {"bf16": bf16})
    assert file.rates(OWNER) == {"copy": copy, "bf16": bf16}
    content = json.loads(file.path.read_text())
    assert content["format"] == 1
    [machine] = content["machines"].values()
    assert machine["machine"] == OWNER, "a reader of the file sees whose they are"


@pytest.mark.parametrize("change", [{"uuid": "2"}, {"power_limit_w": 500.0}, {"gpu": "NVIDIA H100"}])
def test_rates_belong_to_one_machine(file: CeilingsFile, change: dict[str, Any]):
    own = {"copy": rate()}
    file.keep(OWNER, own)
    assert file.rates(OWNER | change) == {}
    file.keep(OWNER | change, {"copy": rate(1e12)})
    assert file.rates(OWNER) == own


def test_many_may_write_at_once(file: CeilingsFile):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: file.keep(OWNER, {f"rate{i}": rate(i)}), range(40)))
    assert set(file.rates(OWNER)) == {f"rate{i}" for i in range(40)}
    assert {path.name for path in file.path.parent.iterdir()} == {"ceilings.json", "ceilings.lock"}, "no part is left"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2, "machines": {}}', '{"format": 1, "machines": []}', '{"machines": {}}']
)
def test_foreign_file_is_told_in_one_line(file: CeilingsFile, text: str):
    file.path.parent.mkdir()
    file.path.write_text(text)
    for use in (lambda: file.rates(OWNER), lambda: file.keep(OWNER, {"copy": rate()})):
        with pytest.raises(UserError, match=r"ceilings\.json holds no ceilings of format 1: delete it"):
            use()
    assert file.path.read_text() == text


@pytest.mark.parametrize("values", [{"burst": 1.0}, {"burst": 1.0, "sustained": 1.0, "at": "yesterday"}])
def test_torn_rates_are_told(file: CeilingsFile, values: dict[str, Any]):
    file.keep(OWNER, {"copy": rate()})
    content = json.loads(file.path.read_text())
    [machine] = content["machines"].values()
    machine["rates"]["copy"] = values
    file.path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is torn"):
        file.rates(OWNER)


def test_freshness():
    assert fresh(rate())
    assert fresh(rate(age=FRESH - timedelta(minutes=1)))
    assert not fresh(rate(age=FRESH + timedelta(minutes=1)))
    assert not fresh(rate(age=-timedelta(hours=1))), "of a clock that went wrong"


def test_place_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("PI0EXP_CEILINGS", raising=False)
    monkeypatch.setattr(ceilings_file, "default_root", lambda: tmp_path)
    assert CeilingsFile.default().path == tmp_path / "ceilings.json"
    monkeypatch.setenv("PI0EXP_CEILINGS", "/elsewhere/rates.json")
    assert CeilingsFile.default().path == Path("/elsewhere/rates.json")


# ---- what a run takes


def take(file: CeilingsFile, kind: str = "bf16", reuse: bool = True) -> ceilings.Reached:
    return reached(kind, GPU, 2.0, reuse, file, OWNER)


def test_run_measures_once_and_then_reuses(file: CeilingsFile, measured: list[str]):
    first = take(file)
    assert (measured, first.reused, first.when) == (["copy", "bf16"], False, "measured in this run")
    again = take(file)
    assert measured == ["copy", "bf16"]
    assert again.roofs == first.roofs
    assert again.reused
    assert again.when.startswith("of 20")
    other = take(file, "tf32")
    assert measured == ["copy", "bf16", "tf32"], "only what is missing"
    assert other.reused, "the copy"
    assert other.when == f"copies {again.when}, products measured in this run"


def test_rates_of_two_days_are_told_as_such(file: CeilingsFile, measured: list[str]):
    old, new = rate(age=timedelta(days=3)), rate(age=timedelta(days=1))
    file.keep(OWNER, {"copy": old, "bf16": new})
    assert take(file).when == f"copies of {old.at}, products of {new.at}"
    file.keep(OWNER, {"copy": rate(age=2 * FRESH)})
    found = take(file)
    assert measured == ["copy"]
    assert (found.reused, found.when) == (True, f"copies measured in this run, products of {new.at}")


def test_thorough_run_measures_again(file: CeilingsFile, measured: list[str]):
    take(file)
    assert not take(file, reuse=False).reused
    assert measured == ["copy", "bf16"] * 2
    assert file.rates(OWNER)["copy"].burst == 3e12, "and keeps what is newer"


def test_old_rates_are_measured_again(file: CeilingsFile, measured: list[str]):
    file.keep(OWNER, {"copy": rate(), "bf16": rate(age=2 * FRESH)})
    take(file)
    assert measured == ["bf16"]


def test_rates_become_metrics(file: CeilingsFile):
    file.keep(OWNER, {"copy": rate(4e12), "bf16": rate(8e14)})
    found = take(file)
    assert found.roofs.burst.bytes_per_s == 4e12
    assert found.roofs.sustained.flops_per_s == pytest.approx(6.4e14)
    assert found.metrics() == pytest.approx(
        {
            "ceilings/copy_tb_per_s": 4,
            "ceilings/matrix_tflop_per_s": 800,
            "ceilings/copy_sustained_tb_per_s": 3.2,
            "ceilings/matrix_sustained_tflop_per_s": 640,
        }
    )


def test_rates_that_cannot_be_kept_are_used_all_the_same(tmp_path: Path, measured: list[str]):
    (tmp_path / "mlruns").write_text("a file in the place of the folder")
    found = take(CeilingsFile(tmp_path / "mlruns" / "ceilings.json"))
    assert found.roofs.burst.bytes_per_s == 1e12
    assert found.when.startswith("measured in this run, not kept: ")


# ---- which rates a GPU has


@pytest.mark.parametrize(
    ("version", "kinds"),
    [((7, 0), {"bf16", "fp32"}), ((8, 0), {"bf16", "fp32", "tf32"}), ((9, 0), {"bf16", "fp32", "tf32", "fp8"})],
)
def test_rates_of_nvidia(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], kinds: set[str]):
    facts = SimpleNamespace(major=version[0], minor=version[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert {kind for kind in rates.RATES if kind != "copy" and not lacking(kind, GPU)} == kinds


def test_rates_of_amd(monkeypatch: pytest.MonkeyPatch):
    facts = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert "NVIDIA" in lacking("tf32", GPU)
    assert lacking("fp8", GPU) == ""
    assert rates.fp8_dtype() is torch.float8_e4m3fnuz
    facts.gcnArchName = "gfx90a"
    assert lacking("fp8", GPU) == "gfx90a has none"
    facts.gcnArchName = "gfx950"
    assert rates.fp8_dtype() is torch.float8_e4m3fn
    assert "no rate has this name" in lacking("int4", GPU)


def test_sustained_is_no_more_than_burst(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "_COPY_BYTES", 1000)
    monkeypatch.setattr(rates, "best_seconds", lambda *given: 2.0)
    monkeypatch.setattr(rates, "sustained_seconds", lambda *given: 1.0)
    found = rates.measure_rate("copy", torch.device("cpu"), 1.0)
    assert (found.burst, found.sustained) == (2000, 2000)


# ---- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, file: CeilingsFile, measured: list[str]) -> CeilingsFile:
    """`main` on a machine with an H200 whose rates are given."""
    monkeypatch.setattr(ceilings, "this_machine", lambda: H200)
    monkeypatch.setattr(ceilings, "owner_of", lambda machine, device: OWNER | {"driver": "580.1", "torch": "2.11.0"})
    monkeypatch.setenv("PI0EXP_CEILINGS", str(file.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    return file


def test_command_measures_everything_and_keeps_it(command: CeilingsFile, measured: list[str], capsys):
    assert main([]) == 0
    assert measured == list(rates.RATES)
    shown = capsys.readouterr().out
    assert main(["--show"]) == 0
    assert capsys.readouterr().out == shown
    assert measured == list(rates.RATES), "--show measures nothing"
    assert [line.split()[0] for line in shown.splitlines()[2:]] == list(rates.RATES)


def test_command_speaks_json(command: CeilingsFile, capsys):
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["rates"]) == set(rates.RATES)
    assert found["rates"]["copy"]["burst"] == 1e12
    assert found["machine"]["gpu"] == "NVIDIA H200"


def test_command_with_nothing_kept(command: CeilingsFile, capsys):
    assert main(["--show"]) == 2
    assert capsys.readouterr().err.endswith("holds no rates of this machine: run python -m pi0exp.ceilings\n")


def test_command_with_a_foreign_file(command: CeilingsFile, capsys):
    command.path.parent.mkdir()
    command.path.write_text("{}")
    assert main(["--show"]) == 2
    assert "delete it" in capsys.readouterr().err


def test_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(ceilings, "this_machine", Machine)
    assert main([]) == 3
    assert capsys.readouterr().err.startswith("pi0exp.ceilings: there is no GPU that torch")


def test_command_refuses_negative_seconds(capsys):
    assert main(["--seconds=-1"]) == 2
    assert "--seconds is -1.0" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "example: python -m pi0exp.ceilings" in capsys.readouterr().out


def test_table_has_units():
    text = table({"copy": Rate(4.24e12, 4.2e12, "2026-11-24"), "bf16": Rate(7.94e14, 6.63e14, "2026-11-24")})
    assert [line.split()[:4] for line in text.splitlines()[1:]] == [
        ["copy", "4.24", "4.20", "TB/s"],
        ["bf16", "794", "663", "TFLOP/s"],
    ]
