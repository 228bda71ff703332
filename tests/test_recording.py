"""Recorded observations are found by name or path, and refused by name where something is wrong in them."""

from pathlib import Path

import numpy as np
import pytest

from pi0exp.errors import UserError
from pi0exp.recording import find_observations, load_recording


def test_observations_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    assert find_observations("aloha_sim.npz").name == "aloha_sim.npz"
    own = tmp_path / "own.npz"
    own.write_bytes(b"")
    assert find_observations(str(own)) == own
    with pytest.raises(UserError, match=r"workload\.observations is nowhere\.npz, no such file; .*aloha_sim\.npz"):
        find_observations("nowhere.npz")


def recorded_arrays() -> dict[str, np.ndarray]:
    with np.load(find_observations("aloha_sim.npz")) as file:
        return dict(file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"state_N14": None}, "lacks state_N14; it has camera_mask_3, image"),
        ({"image_N224x224x3": np.zeros((8, 224, 224, 3), np.float32)}, "image_N224x224x3 is float32"),
        ({"image_N224x224x3": np.zeros((8, 3, 224, 224), np.uint8)}, "image_N224x224x3 is uint8"),
        ({"image_N224x224x3": np.zeros((0, 224, 224, 3), np.uint8)}, r"is uint8 \[0, 224, 224, 3\]; wanted uint8 \[1,"),
        ({"state_N14": np.zeros((7, 14))}, r"state_N14 is float64 \[7, 14\]; wanted floating \[8, 14\]"),
        ({"state_N14": np.full((8, 14), np.nan)}, r"state_N14\[0, 0\] is nan"),
        ({"camera_mask_3": np.array([1, 0, 0])}, "camera_mask_3 is int64"),
        ({"camera_mask_3": np.array([True, True, False])}, "pictures of the first camera only"),
        ({"prompt": np.array(7)}, "prompt is int64"),
        ({"prompt": np.array(["a", "b"])}, r"prompt is <U1 \[2\]"),
        ({"prompt": np.array({"a": 1}, dtype=object)}, "no readable .npz file"),
    ],
)
def test_a_recording_with_wrong_content_is_refused(
    tmp_path: Path, changed: dict[str, np.ndarray | None], message: str
) -> None:
    arrays = {name: array for name, array in (recorded_arrays() | changed).items() if array is not None}
    file = tmp_path / "changed.npz"
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=message) as raised:
        load_recording(file)
    assert "changed.npz" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_corrupted_recording_is_refused(tmp_path: Path) -> None:
    whole = find_observations("aloha_sim.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[5000:5100] = bytes(100)
    encrypted = bytearray(whole)
    encrypted[6] |= 1
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    for content in (b"", b"no zip", whole[:1000], whole[:-10], bytes(flipped), bytes(encrypted), array.read_bytes()):
        file = tmp_path / "broken.npz"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.npz is no readable \.npz file: \S"):
            load_recording(file)
