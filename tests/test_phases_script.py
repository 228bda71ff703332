"""experiments/phases.py: what clocks at meetings say, and what it answers without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from pi0exp.experiments import phases
from pi0exp.kernels.step import PHASES, check_clocks

LAYERS, PROGRAMS = 8, 4


def clocks_of(work_us: list[float], meeting_us: float, late_us: float) -> torch.Tensor:
    """Programs that work so long in each phase, the last one longer in every phase, at 1000 ticks a microsecond."""
    rows, now = [], torch.zeros(PROGRAMS)
    late = torch.tensor([0.0] * (PROGRAMS - 1) + [late_us])
    for i in range(len(work_us) * LAYERS):
        rows += [now, now.max() + meeting_us + torch.zeros(PROGRAMS)]
        now = rows[-1] + work_us[i % len(work_us)] + late
    return (1000 * torch.stack(rows)).round().long()


@pytest.mark.parametrize("names", [phases.NAMES, phases.WIDE_NAMES])
def test_phases_are_told_apart(names: tuple[str, ...]):
    work = [1.0 + i for i in range(len(names))]
    found = phases.phases_of(clocks_of(work, 0.8, 0.5), 1000.0, names)
    assert list(found) == list(names)
    for name, us in zip(names, work, strict=True):
        assert found[name] == pytest.approx({"work": us, "slowest": us + 0.5, "wait": 0.8, "whole": us + 1.3})


def test_clocks_must_be_as_many_as_meetings():
    check_clocks(None, PHASES * LAYERS, PROGRAMS)
    check_clocks(torch.zeros(2 * PHASES * LAYERS, PROGRAMS, dtype=torch.int64), PHASES * LAYERS, PROGRAMS)
    few = torch.zeros(2 * PHASES * LAYERS, PROGRAMS - 1, dtype=torch.int64)
    for wrong in (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2 * PHASES * LAYERS, PROGRAMS), few):
        with pytest.raises(ValueError, match=rf"clocks are not int64 \[{2 * PHASES * LAYERS}, {PROGRAMS}\]"):
            check_clocks(wrong, PHASES * LAYERS, PROGRAMS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["stream_qkv"], 2, "no such kernel; there are stream_layers, stream_ring, stream_wide"),
        ([], 3, "needs a GPU of nvidia"),
    ],
)
def test_it_says_what_it_lacks(
    words: list[str], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert phases.main([str(tmp_path / "out.json"), *words]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none")
def test_on_a_gpu(tmp_path: Path):
    assert phases.main([str(tmp_path / "out.json"), "--rounds", "3"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    for name in ("stream_layers", "stream_ring", "stream_wide"):
        assert len(found[name]["ms_a_step"]) == 3
        whole_us = sum(times["whole"] for times in found[name]["phases"].values())
        # 18 layers take no less than the step, and its beginning and end little more.
        assert 0.8 < 18 * whole_us / 1e3 / min(found[name]["ms_a_step"]) < 1.3
