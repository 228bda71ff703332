"""The ways of `experiments/vision_parts.py` compute the same; how long they take is for a GPU to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "vision_parts.py"


@pytest.mark.slow
def test_every_way_is_close_to_the_truth(tmp_path: Path):
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, SCRIPT, out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert all(way["rel_l2"] < 4e-3 for way in found["hidden"].values())  # bf16
    assert set(found["patches"]) == {"convolution", "product", "three bf16"}
    assert all(way["rel_l2"] < 1e-6 for way in found["patches"].values())  # float32, whatever the products are of
    assert ("ms" in found["patches"]["product"]) == torch.cuda.is_available()
    assert found["tower"]["together"]["rel_l2"] == 0
    assert found["tower"]["behind"]["rel_l2"] < 1e-2  # bf16, products of other sizes
    assert len(found["tower"]) == (4 if torch.cuda.is_available() else 2)
    assert len(done.stdout.splitlines()) == sum(len(found[part]) for part in ("hidden", "patches", "tower"))


def test_it_wants_a_file():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "required: OUT.json" in done.stderr
