"""The policy as a user calls it: right actions for every structure of observation, graphs or not, and clear refusals.

Shapes: B batch, L prompt tokens, C action horizon, A action dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, built, noise_for, subject_of, tiny_observation, tiny_policy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pi0exp.attention.sdpa import Sdpa
from pi0exp.compile_mode.default import Default
from pi0exp.errors import UnsupportedError, UserError
from pi0exp.graphs.capture import Tally
from pi0exp.graphs.manual import CapturedCall, Manual
from pi0exp.image_masking.skip import Skip
from pi0exp.library import load_policy
from pi0exp.model.config import CAMERAS, tiny
from pi0exp.model.observation import Observation, observation_from_arrays
from pi0exp.model.pi0 import Pi0, step_size, timesteps
from pi0exp.option import Option
from pi0exp.policy import DeviceCall, Policy
from pi0exp.verify import FP32_LIMIT, rel_l2

ALL, LAST_ABSENT = (1, 1, 1), (1, 1, 0)


def with_options(policy: Policy, **options: Option) -> Policy:
    for group, option in options.items():
        policy.begin(group)
        option.apply(policy)
    return policy


def observations() -> list[Observation]:
    """Structures that come by in turns, several observations of each, hosts' facts different within a structure."""
    return [
        tiny_observation([ALL], [8], seed=0),
        tiny_observation([ALL], [5], seed=1),
        tiny_observation([ALL], [3], seed=2),  # of the structure before, but a shorter prompt
        tiny_observation([LAST_ABSENT], [8], seed=3),
        tiny_observation([ALL], [8], seed=4),
        tiny_observation([ALL, LAST_ABSENT], [8, 8], seed=5),
        tiny_observation([LAST_ABSENT, ALL], [8, 8], seed=6),  # of the structure before, but in the other row
        tiny_observation([ALL, LAST_ABSENT], [5, 8], seed=7),
        tiny_observation([ALL], [12], padded=12, seed=8),
        tiny_observation([(0, 0, 1)], [5], seed=9),
        tiny_observation([ALL], [4], seed=10),
        tiny_observation([(0, 0, 0)], [5], seed=11),
    ]


# ---- graphs


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize(
    "before", [{}, {"image_masking": Skip()}, {"attention": Sdpa()}], ids=["plain", "skip", "sdpa"]
)
def test_graphs_are_replayed_only_for_their_structure(pi05: bool, before: dict[str, Option]):
    policy = with_options(tiny_policy(pi05), **before, graphs=Manual(max_graphs=16))
    expected = with_options(tiny_policy(pi05), **before)
    for observation in observations() * 2:
        noise_BCA = noise_for(policy, observation)
        actions_BCA = policy.sample_actions(observation, noise_BCA)
        assert torch.equal(actions_BCA, expected.sample_actions(observation, noise_BCA))
    counters = policy.counters()
    structures = {observation.structure for observation in observations()}
    assert len(structures) == 8
    assert counters["graphs/captures"] == counters["graphs/kept"] == len(structures)
    assert counters["graphs/evictions"] == 0
    assert counters["graphs/capture_s"] > 0


@pytest.mark.usefixtures("pretended")
def test_least_recently_used_graph_is_dropped():
    policy = with_options(tiny_policy(), graphs=Manual(max_graphs=2))
    one, two, three = tiny_observation([ALL], [8]), tiny_observation([ALL], [5]), tiny_observation([LAST_ABSENT], [8])
    seen = []
    for observation in (one, two, one, three, one, two):
        policy.sample_actions(observation, noise_for(policy, observation))
        counters = policy.counters()
        seen.append(tuple(int(counters[f"graphs/{name}"]) for name in ("captures", "kept", "evictions")))
    # `three` takes the place of `two`, which was used longer ago than `one`; then `two` that of `three`.
    assert seen == [(1, 1, 0), (2, 2, 0), (2, 2, 0), (3, 2, 1), (3, 2, 1), (4, 2, 2)]


@pytest.mark.usefixtures("pretended")
def test_graph_is_keyed_by_the_horizon_too():
    tally = Tally()
    plain, quiet = tiny_policy().plain_call, lambda text: None
    call = CapturedCall(plain, torch.device("cpu"), warmup=1, max_graphs=8, tally=tally, note=quiet)
    observation = tiny_observation()
    for horizon in (10, 12, 10):
        assert call(observation, torch.zeros(1, horizon, 32)).shape == (1, horizon, 32)
    assert tally.counters()["graphs/captures"] == 2


# ---- compilation


@pytest.fixture
def compiler() -> Iterator[None]:
    """Nothing compiled before or after, and the limits of the process as they were."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit
    with torch._dynamo.config.patch(recompile_limit=limits[0], fail_on_recompile_limit_hit=limits[1]):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("pi05", [False, True])
def test_compiled_policy_is_right_for_other_structures(pi05: bool):
    policy, plain = with_options(tiny_policy(pi05), compile_mode=Default()), tiny_policy(pi05)
    given = observations()
    counts = {}
    # Three structures (full; padded; two rows and an absent camera), then others of the same structures.
    for i in (0, 1, 5, 2, 4, 6):
        noise_BCA = noise_for(policy, given[i])
        errors = rel_l2(policy.sample_actions(given[i], noise_BCA), plain.sample_actions(given[i], noise_BCA))
        assert max(errors) < FP32_LIMIT
        counts[i] = policy.counters()["compile/graphs"]
    assert counts[0] >= 3, "a graph a stage"
    assert counts[0] < counts[1] < counts[5], "new structures are compiled anew"
    assert counts[5] == counts[2] == counts[4] == counts[6], "known ones are not"
    assert policy.counters()["compile/breaks"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_more_structures_than_allowed_is_an_error():
    """Not a silent fall to eager."""
    policy = with_options(tiny_policy(), compile_mode=Default(max_structures=1))
    policy.sample_actions(tiny_observation(padded=8))
    with pytest.raises(Exception, match="recompile_limit"):
        policy.sample_actions(tiny_observation(padded=9))


# ---- what is given


@pytest.mark.parametrize(
    ("noise_BCA", "match"),
    [
        (torch.zeros(1, 11, 32), r"noise is torch.float32 \[1, 11, 32\] .* wanted torch.float32 \[1, 10, 32\]"),
        (torch.zeros(1, 10, 31), r"noise is torch.float32 \[1, 10, 31\]"),
        (torch.zeros(2, 10, 32), r"noise is torch.float32 \[2, 10, 32\]"),
        (torch.zeros(10, 32), r"noise is torch.float32 \[10, 32\]"),
        (torch.zeros(1, 10, 32, dtype=torch.float64), "noise is torch.float64"),
        (torch.zeros(1, 10, 32, dtype=torch.bfloat16), "noise is torch.bfloat16"),
        (torch.zeros(1, 10, 32, device="meta"), "on meta; wanted .* on cpu"),
    ],
)
def test_noise_that_does_not_fit(noise_BCA: Tensor, match: str):
    with pytest.raises(UserError, match=match):
        tiny_policy().sample_actions(tiny_observation(), noise_BCA)


def test_observation_on_another_device():
    with pytest.raises(UserError, match="the observation is on meta, the policy on cpu"):
        tiny_policy().sample_actions(tiny_observation().to("meta"))


def test_pictures_of_another_size():
    config = tiny()
    larger = replace(config, vision=replace(config.vision, image_size=70))
    with pytest.raises(UserError, match=r"images\[base_0_rgb\] is \[70, 70\]; the model takes \[56, 56\]"):
        tiny_policy().sample_actions(tiny_observation(config=larger))


def test_state_of_another_size():
    with pytest.raises(UserError, match=r"state_BA is \[1, 14\]; the model takes \[batch, 32\]"):
        tiny_policy().sample_actions(tiny_observation(config=replace(tiny(), action_dim=14)), torch.zeros(1, 10, 32))


def test_noise_is_drawn_if_none_is_given():
    policy, observation = tiny_policy(), tiny_observation()
    torch.manual_seed(5)
    one, other = policy.sample_actions(observation), policy.sample_actions(observation)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    assert torch.equal(policy.sample_actions(observation, torch.randn(1, 10, 32)), one)
    assert one.dtype == torch.float32
    assert one.shape == (1, 10, 32)


# ---- cameras that are not there


def spied(policy: Policy) -> list[Observation]:
    """What arrives at the device part."""
    seen: list[Observation] = []

    def spy(call: DeviceCall) -> DeviceCall:
        return lambda observation, noise_BCA: seen.append(observation) or call(observation, noise_BCA)

    policy.begin("spy")
    policy.wrap_call(spy, "a spy")
    return seen


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize(
    ("cameras", "kept"),
    [
        ([ALL], (0, 1, 2)),
        ([LAST_ABSENT], (0, 1)),
        ([LAST_ABSENT, ALL], (0, 1, 2)),
        ([LAST_ABSENT, (1, 0, 0)], (0, 1)),
        ([(0, 1, 0), (0, 0, 0)], (1,)),
        ([(0, 0, 0)], ()),
        ([(0, 0, 0), (0, 0, 0)], ()),
    ],
)
def test_skip_computes_what_some_row_has(pi05: bool, cameras: list[tuple[int, ...]], kept: tuple[int, ...]):
    policy = with_options(tiny_policy(pi05), image_masking=Skip())
    seen = spied(policy)
    observation = tiny_observation(cameras, [5, 8][: len(cameras)])
    noise_BCA = noise_for(policy, observation)
    actions_BCA = policy.sample_actions(observation, noise_BCA)
    assert list(seen[0].images) == [CAMERAS[slot] for slot in kept]
    assert max(rel_l2(actions_BCA, tiny_policy(pi05).sample_actions(observation, noise_BCA))) < FP32_LIMIT


@pytest.mark.parametrize("pi05", [False, True])
def test_pictures_of_absent_cameras_do_not_count(pi05: bool):
    policy, one = tiny_policy(pi05), tiny_observation([LAST_ABSENT], [5])
    noise_BCA = noise_for(policy, one)
    other = replace(one, images=one.images | {CAMERAS[2]: torch.zeros_like(one.images[CAMERAS[2]])})
    assert torch.equal(policy.sample_actions(one, noise_BCA), policy.sample_actions(other, noise_BCA))


# ---- nothing waits for the device


class Watch(TorchDispatchMode):
    """Collects operations that would wait for the device, or copy between it and the host.

    The meta device stands for the device: it has no values, and its tensors are told from those of the host.
    """

    WAITING = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")
    FROM_PYTHON = ("lift_fresh", "detach_")
    """What is left of `torch.tensor(values, device=...)`, which copies out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        given = {tensor.device.type for tensor in tensors}
        by_mask = name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in tensors[1:])
        if "meta" in given and (name in self.WAITING or by_mask):
            self.found.append(name)
        made = func(*args, **(kwargs or {}))
        result = {t.device.type for t in tree_flatten(made)[0] if isinstance(t, Tensor)}
        if len(given | result) > 1 or (name in self.FROM_PYTHON and "meta" in result):
            self.found.append(f"{name} from {given} to {result}")
        self.calls += "meta" in result
        return made


def watched(call: Callable[[], Tensor]) -> list[str]:
    watch = Watch()
    with watch:
        assert call().device.type == "meta"
    assert watch.calls > 100, "the watch saw nothing"
    return watch.found


def on_meta(policy: Policy) -> Policy:
    policy.model.to("meta")
    return policy


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize(
    ("cameras", "lengths"), [([ALL], [8]), ([LAST_ABSENT], [5]), ([ALL, LAST_ABSENT], [5, 8])], ids=str
)
@pytest.mark.parametrize(
    "options", [{}, {"image_masking": Skip()}, {"attention": Sdpa()}], ids=["plain", "skip", "sdpa"]
)
def test_call_neither_waits_nor_copies(pi05: bool, cameras: list, lengths: list, options: dict[str, Option]):
    policy = on_meta(with_options(tiny_policy(pi05), **options))
    given = tiny_observation(cameras, lengths).to("meta")
    noise_BCA = torch.zeros(len(lengths), 10, 32, device="meta")
    assert watched(lambda: policy.sample_actions(given, noise_BCA)) == []


Change = Callable[[Tensor], Tensor]


def broken(mistake: Change) -> tuple[Policy, Observation, Tensor]:
    """A policy on the meta device whose actions go through `mistake`, and what to call it with."""
    policy = on_meta(tiny_policy())
    policy.begin("toy")
    policy.wrap_call(lambda call: lambda *args: mistake(call(*args)), "a toy")
    return policy, tiny_observation().to("meta"), torch.zeros(1, 10, 32, device="meta")


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (lambda x: x + torch.zeros(x.shape).to(x.device), "to from {'cpu'}"),
        (lambda x: x + torch.from_numpy(np.zeros(32, np.float32)).to(x.device), "to from {'cpu'}"),
        (lambda x: x + torch.empty_like(x).copy_(torch.zeros(32)), "copy_ from"),
        (lambda x: x + torch.tensor([1.0], device=x.device), "detach_"),
        (lambda x: x + torch.tensor(1.0), "add from"),
    ],
    ids=["to", "numpy", "copy", "list", "scalar"],
)
def test_watch_sees_copies(mistake: Change, name: str):
    policy, given, noise_BCA = broken(mistake)
    found = watched(lambda: policy.sample_actions(given, noise_BCA))
    assert any(text.startswith(name) for text in found)


@pytest.mark.parametrize(
    "mistake",
    [lambda x: x * x.sum().item(), lambda x: x if x.any() else -x, lambda x: x[x > 0], lambda x: x.nonzero()],
    ids=["item", "if", "mask", "nonzero"],
)
def test_watch_sees_waiting(mistake: Change):
    policy, given, noise_BCA = broken(mistake)
    watch = Watch()
    # A meta tensor has no value to wait for, so PyTorch refuses as well.
    with watch, pytest.raises((RuntimeError, NotImplementedError)):
        policy.sample_actions(given, noise_BCA)
    assert watch.found


# ---- stages


@pytest.mark.parametrize("pi05", [False, True])
@torch.inference_mode()
def test_stages_called_one_by_one_make_the_actions(pi05: bool):
    policy = tiny_policy(pi05)
    model: Pi0 = policy.model
    given = tiny_observation([ALL, LAST_ABSENT], [5, 8])
    noise_BCA = noise_for(policy, given)
    images, masks = list(given.images.values()), list(given.camera_masks.values())
    prefix_BSD, valid_BS = model.embed_prefix(images, masks, given.prompt_BL, given.prompt_mask_BL)
    cache = model.prefill(prefix_BSD, valid_BS, given.structure.full)
    x_BCA = noise_BCA
    context = model.begin(cache, valid_BS, given.state_BA, policy.horizon, given.structure.full)
    for time in timesteps(policy.num_steps):
        velocity_BCA = model.denoise_step(x_BCA, torch.full((2,), time), context)
        x_BCA = torch.add(x_BCA, velocity_BCA, alpha=step_size(policy.num_steps))
    assert torch.equal(x_BCA, policy.sample_actions(given, noise_BCA))


@pytest.mark.parametrize("stage", ["vision", "prefill", "denoise"])
def test_wrapped_stage_is_called(stage: str):
    policy, calls = tiny_policy(), []
    policy.begin("toy")
    policy.wrap_stage(stage, lambda function: lambda *args: calls.append(stage) or function(*args), "a toy")
    policy.sample_actions(tiny_observation())
    assert len(calls) == (1 + policy.num_steps if stage == "denoise" else 1)
    assert policy.applied["toy"][0].startswith(f"{stage}: Pi0.")


# ---- the library


def test_loaded_policy_is_the_one_that_is_measured():
    words = ["attention=sdpa", "workload.num_steps=3", "workload.horizon=12"]
    policy = load_policy(model="tiny_pi05", overrides=words, device="cpu")
    measured = built(subject_of("model=tiny_pi05", *words))
    for observation, noise_BCA in measured.device_items:
        actions_BCA = policy.sample_actions(observation, noise_BCA)
        assert actions_BCA.shape == (1, 12, 32)
        assert torch.equal(actions_BCA, measured.policy.sample_actions(observation, noise_BCA))
    assert policy.applied == measured.applied


def test_loaded_policy_without_a_stack_is_plain():
    policy = load_policy(model="tiny", overrides=["precision=fp32", "workload.num_steps=3"], device="cpu")
    assert list(policy.applied) == ["precision"]
    given = tiny_observation()
    noise_BCA = noise_for(policy, given)
    assert torch.equal(policy.sample_actions(given, noise_BCA), tiny_policy().sample_actions(given, noise_BCA))


def test_named_stack_is_applied():
    assert list(load_policy("0_eager", "tiny", device="cpu").applied) == ["precision"]


@pytest.mark.parametrize("words", [{"overrides": ["graphs=manual"]}, {"stack": "1_graphs"}])
def test_graphs_are_refused_without_a_gpu(words: dict[str, Any]):
    with pytest.raises(UnsupportedError, match="graphs: needs a GPU of nvidia or amd"):
        load_policy(model="tiny", device="cpu", **words)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"overrides": ["attention=flsh"]}, "attention/flsh.*eager, sdpa"),
        ({"overrides": ["attention.denoise=flsh"]}, "attention.denoise is 'flsh'"),
        ({"overrides": ["workload.horizon=0"]}, "workload.horizon is 0"),
        ({"overrides": ["workload.horizn=1"]}, "workload.horizn"),
        ({"overrides": ["not a word"]}, "not a word"),
        ({"stack": "nope"}, "stack/nope"),
        ({"model": "nope"}, "model/nope"),
        ({"device": "tpu"}, "measure.device"),
        ({"checkpoint": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(words: dict[str, Any], match: str):
    with pytest.raises(UserError, match=match) as caught:
        load_policy(**{"model": "tiny", "device": "cpu"} | words)
    assert "\n" not in str(caught.value)


def test_use_as_a_library():
    """The shortest program."""
    policy = load_policy(model="tiny", device="cpu")
    size = policy.model.config.vision.image_size
    observation = observation_from_arrays(
        images={camera: np.zeros((1, size, size, 3), np.uint8) for camera in CAMERAS},
        image_masks={CAMERAS[2]: np.array([False])},
        state=np.zeros((1, 32)),
        tokens=np.array([[2, 17, 108]]),
        token_mask=np.ones((1, 3), bool),
        config=policy.model.config,
        device=policy.device,
    )
    actions = policy.sample_actions(observation).numpy()
    assert actions.shape == (1, 10, 32)
    assert np.isfinite(actions).all()
    assert policy.device == CPU
