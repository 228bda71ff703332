"""Workloads and the host arrays that they stand for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

import pi0exp
from pi0exp.errors import UserError
from pi0exp.model.config import CAMERAS, ModelConfig, tiny
from pi0exp.preprocess import Normalization, adapt_to_pi
from pi0exp.recording import find_observations, load_recording
from pi0exp.workload import HostInput, Workload, host_inputs, verification_inputs

CONFIG = tiny()
IDENTITY = Normalization()
ALOHA: dict[str, Any] = {
    "cameras_present": [True, False, False],
    "prompt_tokens": None,
    "prompt_padded": 12,
    "observations": "aloha_sim.npz",
}
WORKLOADS = Path(pi0exp.__file__).parent / "conf" / "workload"


def items(workload: Workload, count: int = 2, config: ModelConfig = CONFIG) -> list[HostInput]:
    return host_inputs(workload, config, IDENTITY, count).items


def prompt_lengths(item: HostInput) -> list[int]:
    return [int(length) for length in item.token_mask.sum(1)]


def absent(item: HostInput) -> list[str]:
    return [name for name, mask in item.image_masks.items() if not mask.any()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "workload.batch_size is 0; it must be 1 or more"),
        ({"horizon": 0}, "workload.horizon is 0; it must be 1 or more"),
        ({"num_steps": -3}, "workload.num_steps is -3; it must be 1 or more"),
        ({"prompt_padded": -1}, "workload.prompt_padded is -1; it must be 0 or more"),
        ({"seed": -1}, "workload.seed is -1; it must be 0 or more"),
        ({"prompt_tokens": 21}, "workload.prompt_tokens is 21; it must be 0 to 20"),
        ({"prompt_tokens": -1}, "workload.prompt_tokens is -1; it must be 0 to 20"),
        ({"cameras_present": [True, True]}, r"workload.cameras_present is \[True, True\]; wanted"),
        ({"cameras_present": [1, 1, 0]}, r"workload.cameras_present is \[1, 1, 0\]; wanted"),
        ({"cameras_present": [False] * 3, "prompt_tokens": 0}, "workload.cameras_present has no camera"),
        ({"prompt_tokens": None}, "workload.prompt_tokens is null"),
        ({"observations": "aloha_sim.npz"}, "workload.prompt_tokens is 20; it must be null with workload.observations"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Workload(**fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [{"prompt_tokens": 0}, {"prompt_tokens": 0, "prompt_padded": 0}, {"cameras_present": [False] * 3}, ALOHA],
)
def test_fields_that_look_odd_but_work(fields: dict[str, Any]) -> None:
    for item in items(Workload(**fields)):
        item.observation(CONFIG, "cpu")


def test_a_workload_can_be_configured_through_omegaconf() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(Workload), ALOHA, {"horizon": 50})
    assert OmegaConf.to_object(merged) == Workload(**ALOHA, horizon=50)
    assert OmegaConf.to_object(OmegaConf.structured(Workload)) == Workload()
    with pytest.raises(ValueError, match=r"workload\.horizon is 0"):
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Workload), {"horizon": 0}))


@pytest.mark.parametrize(
    ("name", "cameras", "prompt", "horizon"),
    [
        ("default", [True, True, True], (20, 20), 10),
        ("masked", [True, True, False], (20, 20), 10),
        ("aloha", [True, False, False], (None, 48), 50),
        ("pi05", [True, True, True], (200, 200), 50),
    ],
)
def test_the_workloads_that_come_with_the_package(
    name: str, cameras: list[bool], prompt: tuple[int | None, int], horizon: int
) -> None:
    file = WORKLOADS / f"{name}.yaml"
    settings = OmegaConf.load(file)
    assert set(settings) == set(Workload.__dataclass_fields__)
    assert file.read_text().startswith("# ")
    workload = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Workload), settings))
    assert isinstance(workload, Workload)
    assert (workload.name, workload.cameras_present, workload.horizon) == (name, cameras, horizon)
    assert (workload.prompt_tokens, workload.prompt_padded) == prompt
    for item in items(workload, 1):
        observation = item.observation(CONFIG, "cpu")
        assert observation.prompt_padded == workload.prompt_padded
        assert [present == "all" for _, present in observation.structure.cameras] == cameras


def test_synthetic_arrays() -> None:
    workload = Workload(batch_size=3, prompt_tokens=4, prompt_padded=6, cameras_present=[True, False, True])
    inputs = host_inputs(workload, CONFIG, IDENTITY, 2)
    assert inputs.facts == {"tokens": "stand-in", "normalization": "identity", "observations": "synthetic"}
    for item in inputs.items:
        size = CONFIG.vision.image_size
        assert tuple(item.images) == CAMERAS
        assert all((a.dtype, a.shape) == (np.uint8, (3, size, size, 3)) for a in item.images.values())
        assert {name: mask.tolist() for name, mask in item.image_masks.items()} == dict(
            zip(CAMERAS, ([True] * 3, [False] * 3, [True] * 3), strict=True)
        )
        assert (item.state.dtype, item.state.shape) == (np.float32, (3, CONFIG.action_dim))
        assert (item.noise.dtype, item.noise.shape) == (np.float32, (3, 10, CONFIG.action_dim))
        assert (item.tokens.dtype, item.token_mask.dtype) == (np.int64, np.bool_)
        assert prompt_lengths(item) == [4, 4, 4]
        assert (item.tokens[:, 0] == 2).all()
        assert (item.tokens[:, 1:4] >= 3).all()
        assert (item.tokens < CONFIG.vocab_size).all()
        assert (item.tokens[:, 4:] == 0).all()


def test_synthetic_pictures_have_content_even_where_the_camera_is_absent() -> None:
    (item,) = items(Workload(cameras_present=[True, True, False]), 1)
    for image in item.images.values():
        assert image.std() > 40
        # Also within each patch of the model.
        assert min(image[0, y : y + 14, x : x + 14].std() for y in range(0, 56, 14) for x in range(0, 56, 14)) > 5
        assert len(np.unique(image)) > 200
    first, second, third = item.images.values()
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_synthetic_states_are_normal_on_all_dims() -> None:
    states = np.concatenate([item.state for item in items(Workload(batch_size=64), 2)])
    assert abs(states.mean()) < 0.1
    assert abs(states.std(axis=0) - 1).max() < 0.35


def test_inputs_differ_and_are_the_same_again() -> None:
    first, again = items(Workload(), 8), items(Workload(), 9)
    for part in ("state", "tokens", "noise"):
        assert len({getattr(item, part).tobytes() for item in first}) == 8
        assert all(np.array_equal(getattr(a, part), getattr(b, part)) for a, b in zip(first, again, strict=False))
    assert len({item.images[name].tobytes() for item in first for name in CAMERAS}) == 24
    other = items(Workload(seed=1), 1)[0]
    assert not np.array_equal(other.state, first[0].state)
    assert not np.array_equal(other.noise, first[0].noise)


def test_rows_are_the_same_in_any_batch() -> None:
    single, double = items(Workload(), 4), items(Workload(batch_size=2), 2)
    for part in ("state", "tokens", "noise"):
        rows = np.concatenate([getattr(item, part) for item in double])
        assert np.array_equal(rows, np.concatenate([getattr(item, part) for item in single]))


def test_no_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="count is 0"):
        host_inputs(Workload(), CONFIG, IDENTITY, 0)


def test_recorded_arrays() -> None:
    inputs = host_inputs(Workload(**ALOHA, batch_size=3), CONFIG, IDENTITY, 4)
    assert inputs.facts["tokens"] == "stand-in"
    assert inputs.facts["normalization"] == "identity"
    assert inputs.facts["observations"].startswith("aloha_sim.npz sha256:")
    assert len(inputs.facts["observations"]) == len("aloha_sim.npz sha256:") + 8
    recording = load_recording(find_observations("aloha_sim.npz"))
    for i, item in enumerate(inputs.items):
        assert absent(item) == list(CAMERAS[1:])
        assert not item.images[CAMERAS[1]].any()
        for b in range(3):
            state = adapt_to_pi(recording.states[(i * 3 + b) % 8]).astype(np.float32)
            assert np.array_equal(item.state[b, :14], state)
        assert not item.state[:, 14:].any()
        assert prompt_lengths(item) == [4, 4, 4]  # start, two words, end of line
    noises = {item.noise[b].tobytes() for item in inputs.items for b in range(3)}
    assert len(noises) == 12


def test_recorded_pictures_have_bars_of_28_rows() -> None:
    config = ModelConfig(vocab_size=512)
    recording = load_recording(find_observations("aloha_sim.npz"))
    (item,) = items(Workload(**ALOHA), 1, config)
    image = item.images[CAMERAS[0]][0]
    assert np.array_equal(image, recording.images[0])
    assert not image[:28].any()
    assert not image[-28:].any()
    assert image[28:-28].any()
    (small,) = items(Workload(**ALOHA), 1)
    assert small.images[CAMERAS[0]].shape == (1, 56, 56, 3)
    assert not small.images[CAMERAS[0]][0, :6].any()


def test_pi05_reads_the_normalised_state_in_its_prompt() -> None:
    low, high = Normalization(q01=(-9.0,) * 14, q99=(9.0,) * 14), Normalization(q01=(5.0,) * 14, q99=(6.0,) * 14)
    workload = Workload(**ALOHA | {"prompt_padded": 100})
    inside, below = (host_inputs(workload, tiny(pi05=True), each, 1) for each in (low, high))
    assert abs(inside.items[0].state).max() < 1
    assert below.items[0].state[:, :14].max() < -1
    # Three digits and a space for nearly every number in the middle of the range; " -1" is two pieces.
    assert prompt_lengths(below.items[0]) == [1 + 5 + 2 + 14 * 2 + 5]
    assert prompt_lengths(inside.items[0])[0] > prompt_lengths(below.items[0])[0]


def test_a_recorded_prompt_that_is_too_long_is_cut_and_the_record_says_so() -> None:
    inputs = host_inputs(Workload(**ALOHA | {"prompt_padded": 3}), CONFIG, IDENTITY, 1)
    assert prompt_lengths(inputs.items[0]) == [3]
    assert inputs.facts["prompt"] == "cut from 4 to 3 tokens"
    assert "prompt" not in host_inputs(Workload(**ALOHA), CONFIG, IDENTITY, 1).facts


def test_cameras_must_be_those_of_the_recording() -> None:
    with pytest.raises(UserError, match=r"workload.cameras_present is \[True, True, True\].*base_0_rgb present"):
        items(Workload(**ALOHA | {"cameras_present": [True] * 3}))


def test_a_missing_tokenizer_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer nowhere\.model is no file"):
        items(Workload(**ALOHA, tokenizer="nowhere.model"))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_verification_covers_padding_and_absent_cameras(batch: int) -> None:
    given = verification_inputs(Workload(batch_size=batch), CONFIG, IDENTITY)
    assert len(given) == 8
    structures = [item.observation(CONFIG, "cpu").structure for item in given]
    assert [structure.prompt_full for structure in structures] == [True, True, False, False, True, True, False, False]
    assert [absent(item) for item in given] == [[]] * 4 + [["left_wrist_0_rgb"]] * 4
    assert [structure.prompt_padded for structure in structures] == [20] * 8
    assert prompt_lengths(given[2]) == [12] * batch
    assert prompt_lengths(given[6]) == [12, 20, 12, 20][:batch]
    assert len({item.noise.tobytes() for item in given}) == 8
    for item in given:
        assert (item.tokens[~item.token_mask] == 0).all()
        assert item.images["left_wrist_0_rgb"].std() > 40


def test_verification_keeps_what_the_workload_lacks_already() -> None:
    masked = verification_inputs(Workload(cameras_present=[True, True, False]), CONFIG, IDENTITY)
    assert [absent(item) for item in masked] == [["right_wrist_0_rgb"]] * 8
    aloha = verification_inputs(Workload(**ALOHA), CONFIG, IDENTITY)
    assert [prompt_lengths(item) for item in aloha] == [[4], [4], [2], [2]] * 2
    assert {item.tokens.shape for item in aloha} == {(1, 12)}


@pytest.mark.parametrize(("tokens", "padded", "cut"), [(0, 0, 1), (1, 1, 1), (0, 5, 1), (1, 2, 1), (2, 2, 1)])
def test_verification_of_the_shortest_prompts(tokens: int, padded: int, cut: int) -> None:
    workload = Workload(batch_size=2, prompt_tokens=tokens, prompt_padded=padded)
    given = verification_inputs(workload, CONFIG, IDENTITY)
    assert prompt_lengths(given[0]) == [tokens] * 2
    assert prompt_lengths(given[2]) == [cut] * 2
    assert prompt_lengths(given[6]) == [cut, 2]
    assert given[2].tokens.shape == (2, padded if padded >= 2 else 4)
    assert all(not item.observation(CONFIG, "cpu").structure.prompt_full for item in (given[2], given[6]))
