"""Pictures, states and their statistics, against the properties and formulas of openpi's policy path."""

import json
from pathlib import Path

import numpy as np
import pytest

from pi0exp.errors import UserError
from pi0exp.preprocess import Normalization, adapt_to_pi, load_normalization, pad_state, resize_with_pad

STATISTICS = {"mean": [1.0, 2.0, 9.0], "std": [2.0, 0.0, 9.0], "q01": [0.0, -1.0, 9.0], "q99": [4.0, 3.0, 9.0]}


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (height, width, 3)).astype(np.uint8)


def bars(image: np.ndarray) -> tuple[int, int, int, int]:
    """Black rows above and below, black columns left and right."""
    rows, columns = image.any((1, 2)).nonzero()[0], image.any((0, 2)).nonzero()[0]
    return rows[0], image.shape[0] - 1 - rows[-1], columns[0], image.shape[1] - 1 - columns[-1]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (28, 28, 0, 0)),
        (640, 480, (0, 0, 28, 28)),
        (100, 100, (0, 0, 0, 0)),
        (50, 100, (56, 56, 0, 0)),
        (3, 224, (110, 111, 0, 0)),  # an odd rest goes below
    ],
)
def test_resize_keeps_aspect_and_centres_on_black(height: int, width: int, expected: tuple[int, ...]) -> None:
    image = resize_with_pad(picture(height, width), 224)
    assert (image.dtype, image.shape) == (np.uint8, (224, 224, 3))
    assert bars(image) == expected


def test_resize_is_antialiased() -> None:
    """Every second column white: a filter that looks at neighbours only makes grey, one that picks makes stripes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = resize_with_pad(stripes, 16)[:, 2:-2].astype(int)
    assert abs(inner - 127).max() <= 2


def test_resize_leaves_a_picture_of_the_wanted_size_as_it_is() -> None:
    image = picture(56, 56)
    assert resize_with_pad(image, 56) is image


@pytest.mark.parametrize(
    "bad",
    [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4), np.uint8), picture(1, 4000)],
)
def test_resize_refuses_what_is_no_picture(bad: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"^picture [^\n]*$"):
        resize_with_pad(bad, 224)


def test_adapt_to_pi_flips_joints_and_turns_grippers_into_angles() -> None:
    adapted = adapt_to_pi(np.ones(14, np.float32))
    # Open: the fingers stand at 0.058 m, which no angle of the horn reaches, so the sine is clipped to 1.
    gripper = (np.pi / 2 - 0.5476) / (1.6296 - 0.5476)
    one_arm = [1, -1, -1, 1, 1, 1, gripper]
    np.testing.assert_allclose(adapted, one_arm * 2, rtol=1e-12)
    assert adapted.dtype == np.float64

    closed = adapt_to_pi(np.zeros(14))[6]
    sine = (0.022**2 + 0.01844**2 - 0.036**2) / (2 * 0.022 * 0.01844)
    assert closed == pytest.approx((np.arcsin(sine) - 0.5476) / (1.6296 - 0.5476))
    with pytest.raises(UserError, match=r"ALOHA state has the shape \[13\]; wanted \[14\]"):
        adapt_to_pi(np.zeros(13))


def test_adapt_to_pi_leaves_its_input_alone() -> None:
    state = np.full(14, 0.5)
    adapt_to_pi(state)
    assert (state == 0.5).all()


def test_pad_state() -> None:
    assert pad_state(np.array([1.0, 2.0]), 4).tolist() == [1.0, 2.0, 0.0, 0.0]
    with pytest.raises(UserError, match="action_dim"):
        pad_state(np.zeros(5), 4)


def checkpoint(root: Path, content: object, asset: str = "trossen") -> Path:
    folder = root / "assets" / asset
    folder.mkdir(parents=True)
    (folder / "norm_stats.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def test_normalization_by_mean_and_std_or_by_quantiles(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"norm_stats": {"state": STATISTICS, "actions": {}}})
    state = np.array([3.0, 2.0], np.float32)  # shorter than the statistics, whose end is cut off
    pi0, pi05 = load_normalization(tmp_path, pi05=False), load_normalization(tmp_path, pi05=True)
    assert pi0.label == pi05.label == "norm_stats of assets/trossen"
    np.testing.assert_allclose(pi0.apply(state), [2 / (2 + 1e-6), 0.0], rtol=1e-15)
    np.testing.assert_allclose(pi05.apply(state), [3 / (4 + 1e-6) * 2 - 1, 3 / (4 + 1e-6) * 2 - 1], rtol=1e-15)
    assert pi0.apply(state).dtype == np.float64
    assert pi0.apply(np.array([1e6, 0.0]))[0] > 1e5  # nothing is clipped
    with pytest.raises(UserError, match=r"norm_stats of assets/trossen has 3 numbers for the state; .* has 14"):
        pi0.apply(np.zeros(14))


def test_no_statistics_are_identity(tmp_path: Path) -> None:
    for normalization in (load_normalization(None, pi05=True), load_normalization(tmp_path, pi05=False)):
        assert normalization == Normalization()
        assert normalization.label == "identity"
        assert normalization.apply(np.array([5.0])).tolist() == [5.0]


def test_an_asset_may_have_slashes_in_its_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"norm_stats": {"state": STATISTICS}}, "physical-intelligence/libero")
    assert load_normalization(tmp_path, pi05=False).label == "norm_stats of assets/physical-intelligence/libero"


def test_several_assets_are_refused(tmp_path: Path) -> None:
    for asset in ("trossen", "droid"):
        checkpoint(tmp_path, {"norm_stats": {"state": STATISTICS}}, asset)
    with pytest.raises(UserError, match="assets/droid, assets/trossen; keep exactly one"):
        load_normalization(tmp_path, pi05=False)


@pytest.mark.parametrize(
    ("content", "pi05", "message"),
    [
        ("{not json", False, "cannot be read as JSON"),
        ([], False, "norm_stats.state is missing"),
        ({"norm_stats": {"actions": {}}}, False, "norm_stats.state is missing"),
        ({"norm_stats": {"state": STATISTICS | {"q01": None, "q99": None}}}, True, "norm_stats.state.q01 is missing"),
        ({"norm_stats": {"state": {"mean": [0.0]}}}, False, "norm_stats.state.std is missing"),
        ({"norm_stats": {"state": STATISTICS | {"std": [1.0, "2", 3.0]}}}, False, "norm_stats.state.std .*finite"),
        ({"norm_stats": {"state": STATISTICS | {"mean": [float("nan")]}}}, False, "norm_stats.state.mean .*finite"),
        ({"norm_stats": {"state": STATISTICS | {"std": [1.0]}}}, False, "differ in length"),
    ],
)
def test_malformed_statistics_are_refused(tmp_path: Path, content: object, pi05: bool, message: str) -> None:
    checkpoint(tmp_path, content)
    with pytest.raises(UserError, match=message) as raised:
        load_normalization(tmp_path, pi05=pi05)
    assert "norm_stats.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_checkpoint_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not there"):
        load_normalization(tmp_path / "nowhere", pi05=False)
