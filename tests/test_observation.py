"""`observation_from_arrays` refuses what the model cannot take, by name, and knows the structure of what it can."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from pi0exp.errors import UserError
from pi0exp.model.config import CAMERAS, tiny
from pi0exp.model.observation import Observation, observation_from_arrays, scaled

CONFIG = tiny()
SIZE = CONFIG.vision.image_size
BATCH, LENGTH = 2, 5


def arrays() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "images": {name: random.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8) for name in CAMERAS},
        "image_masks": {name: np.ones(BATCH, bool) for name in CAMERAS},
        "state": random.standard_normal((BATCH, CONFIG.action_dim)),
        "tokens": random.integers(0, CONFIG.vocab_size, (BATCH, LENGTH)),
        "token_mask": np.ones((BATCH, LENGTH), bool),
    }


def observe(given: dict[str, Any]) -> Observation:
    return observation_from_arrays(**given, config=CONFIG, device="cpu")


def test_arrays_become_tensors_in_the_ranges_of_the_model() -> None:
    given = arrays()
    given["images"][CAMERAS[0]][0, 0, 0] = [0, 255, 51]
    observation = observe(given)
    assert observation.image_sizes == [(SIZE, SIZE)] * 3
    assert not observation.structure.scaled
    image = scaled(observation.images[CAMERAS[0]])
    assert scaled(image) is image
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (BATCH, 3, SIZE, SIZE))
    torch.testing.assert_close(image[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert tuple(observation.images) == tuple(observation.camera_masks) == CAMERAS
    assert observation.state_BA.dtype == torch.float32
    assert observation.prompt_BL.dtype == torch.int64
    assert observation.prompt_BL.tolist() == given["tokens"].tolist()


def test_a_camera_without_a_mask_is_present() -> None:
    given = arrays()
    del given["image_masks"][CAMERAS[1]]
    assert observe(given).cameras_present[CAMERAS[1]] == (True, True)


def test_cameras_stand_in_the_order_of_the_model_whatever_order_they_came_in() -> None:
    given = arrays()
    given["images"] = dict(reversed(given["images"].items()))
    observation = observe(given)
    assert tuple(observation.images) == CAMERAS
    first = torch.from_numpy(given["images"][CAMERAS[0]]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(scaled(observation.images[CAMERAS[0]]), first)


def change(name: str, array: object) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.update({name: array})


def change_picture(array: object, camera: str = CAMERAS[1]) -> Callable[[dict[str, Any]], None]:
    return lambda given: given["images"].update({camera: array})


def change_mask(array: object, camera: str = CAMERAS[1]) -> Callable[[dict[str, Any]], None]:
    return lambda given: given["image_masks"].update({camera: array})


def no_picture(given: dict[str, Any]) -> None:
    del given["images"][CAMERAS[2]]


def nothing_to_see_or_read(given: dict[str, Any]) -> None:
    for mask in given["image_masks"].values():
        mask[1] = False
    given["token_mask"][1] = False


def state_with(value: float) -> np.ndarray:
    state = np.zeros((BATCH, CONFIG.action_dim))
    state[1, 3] = value
    return state


PICTURES = (BATCH, SIZE, SIZE, 3)
HOLE = np.array([[True, False, True, True, True]] * BATCH)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_picture(np.zeros(PICTURES, np.float32)), r"images\[left_wrist_0_rgb\] is float32"),
        (change_picture(np.zeros((BATCH, 3, SIZE, SIZE), np.uint8)), r"images\[left_wrist_0_rgb\] .*; wanted uint8"),
        (change_picture(np.zeros((1, SIZE, SIZE, 3), np.uint8)), r"images\[left_wrist_0_rgb\] is uint8 \[1,"),
        (change_picture(torch.zeros(PICTURES)), r"images\[left_wrist_0_rgb\] is a Tensor"),
        (change_picture(np.zeros(PICTURES, np.uint8), "cam_low"), "unknown camera 'cam_low'"),
        (change_mask(np.ones(BATCH, bool), "cam_low"), "unknown camera 'cam_low'"),
        (no_picture, "lack 'right_wrist_0_rgb'"),
        (change_mask(np.ones(BATCH)), r"image_masks\[left_wrist_0_rgb\] is float64"),
        (change_mask(np.ones(BATCH + 1, bool)), r"image_masks\[left_wrist_0_rgb\] is bool \[3\]"),
        (change("state", np.zeros((BATCH, 14))), r"state is float64 \[2, 14\]; wanted floating \[batch, 32\]"),
        (change("state", np.zeros((BATCH, 32), np.int64)), "state is int64"),
        (change("state", np.zeros(32)), r"state is float64 \[32\]"),
        (change("state", np.zeros((0, 32))), "no rows"),
        (change("state", state_with(float("nan"))), r"state\[1, 3\] is nan"),
        (change("state", state_with(float("inf"))), r"state\[1, 3\] is inf"),
        (change("state", state_with(1e39)), r"state\[1, 3\] is 1e\+39; the state must be finite in float32"),
        (change("state", [0.0] * 32), "state is a list"),
        (change("tokens", np.full((BATCH, LENGTH), CONFIG.vocab_size)), "token 512 is outside of the vocabulary"),
        (change("tokens", np.full((BATCH, LENGTH), -1)), "token -1 is outside of the vocabulary"),
        (change("tokens", np.zeros((BATCH, LENGTH))), "tokens is float64"),
        (change("tokens", np.zeros((1, LENGTH), int)), r"tokens is int64 \[1, 5\]"),
        (change("token_mask", np.ones((BATCH, LENGTH), int)), "token_mask is int64"),
        (change("token_mask", np.ones((BATCH, LENGTH - 1), bool)), r"token_mask is bool \[2, 4\]"),
        (change("token_mask", HOLE), "token_mask is not a run of True"),
        (nothing_to_see_or_read, "row 1 has neither a camera nor a prompt"),
    ],
)
def test_a_bad_observation_is_refused_by_name(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    given = arrays()
    spoil(given)
    with pytest.raises(UserError, match=message) as raised:
        observe(given)
    assert str(raised.value).startswith("observation")
    assert "\n" not in str(raised.value)


def test_structure_of_a_full_batch() -> None:
    structure = observe(arrays()).structure
    assert structure.batch_size == BATCH
    assert structure.cameras == tuple((name, "all") for name in CAMERAS)
    assert (structure.prompt_padded, structure.prompt_full, structure.full) == (LENGTH, True, True)


def test_structure_of_a_mixed_batch() -> None:
    given = arrays()
    given["image_masks"] = {name: np.array(rows) for name, rows in zip(CAMERAS, [[1, 1], [1, 0], [0, 0]], strict=True)}
    given["image_masks"] = {name: mask.astype(bool) for name, mask in given["image_masks"].items()}
    structure = observe(given).structure
    assert dict(structure.cameras) == dict(zip(CAMERAS, ("all", "some", "none"), strict=True))
    assert structure.prompt_full
    assert not structure.full


def test_structure_of_a_padded_prompt() -> None:
    given = arrays()
    given["token_mask"][1, -1] = False
    observation = observe(given)
    assert observation.prompt_lengths == (LENGTH, LENGTH - 1)
    assert not observation.structure.prompt_full
    assert not observation.structure.full
    assert hash(observation.structure) == hash(observe(given).structure)


def test_an_empty_prompt_is_enough_where_a_camera_is() -> None:
    given = arrays()
    given |= {"tokens": np.zeros((BATCH, 0), int), "token_mask": np.zeros((BATCH, 0), bool)}
    assert observe(given).structure.full


def test_tensors_and_cameras_can_be_replaced() -> None:
    observation = observe(arrays())
    copy = observation.with_tensors([tensor.clone() for tensor in observation.tensors()])
    assert copy.structure == observation.structure
    assert all(torch.equal(a, b) for a, b in zip(copy.tensors(), observation.tensors(), strict=True))
    fewer = observation.only_cameras([CAMERAS[0], CAMERAS[2]])
    assert tuple(fewer.images) == (CAMERAS[0], CAMERAS[2])
    assert fewer.structure.full


def test_what_is_not_checked_on_the_way_would_pass() -> None:
    """Observations of arrays and those with less in them are made without the checks of `Observation`."""
    given = arrays()
    given["token_mask"][:, -2:] = False
    given["image_masks"][CAMERAS[1]] = np.zeros(BATCH, bool)
    whole = observe(given)
    assert whole.structure.cameras[1] == (CAMERAS[1], "none")
    fewer = whole.only_cameras([CAMERAS[0], CAMERAS[2]])
    shorter = fewer.only_prompt(LENGTH - 2)
    for made in (whole, fewer, shorter):
        checked = Observation(**{field.name: getattr(made, field.name) for field in fields(Observation)})
        assert checked.structure == made.structure
    assert [len(made.structure.cameras) for made in (whole, fewer)] == [3, 2]
    assert [made.structure.prompt_padded for made in (fewer, shorter)] == [LENGTH, LENGTH - 2]
    assert shorter.structure.full


def test_arrays_of_any_order_of_bytes_and_steps_are_taken() -> None:
    """A batch of one may be stepped through backwards, which numpy calls contiguous and PyTorch does not take."""
    given = {
        name: {camera: one[:1] for camera, one in value.items()} if isinstance(value, dict) else value[:1]
        for name, value in arrays().items()
    }
    odd = dict(given)
    odd["images"] = {name: image[::-1] for name, image in given["images"].items()}
    odd["tokens"] = given["tokens"].astype(">i4")[::-1]
    odd["state"] = given["state"].astype(">f8")[::-1]
    assert odd["tokens"].strides[0] < 0
    for one, other in zip(observe(odd).tensors(), observe(given).tensors(), strict=True):
        assert torch.equal(one, other)
