"""The least work of a call, against numbers counted independently of this code, and what must hold of any workload."""

from xml.etree import ElementTree

import pytest

from pi0exp.model.config import ModelConfig, tiny
from pi0exp.roofline import Ceilings, Rooflines, floor_ms, least_time, policy_work, shares
from pi0exp.roofline_plot import placed, roof, roofline_svg
from pi0exp.subject import StageWork

PI0, PI05 = ModelConfig(), ModelConfig(pi05=True)
H200 = Ceilings(bytes_per_s=4.3e12, flops_per_s=788e12)


def work(config: ModelConfig, cameras: int, prompts: list[int], horizon: int, num_steps: int = 10) -> dict:
    return {stage.name: stage for stage in policy_work(config, cameras, prompts, horizon, num_steps)}


@pytest.mark.parametrize(
    ("config", "cameras", "prompt", "horizon", "gflop"),
    [
        (PI0, 3, 20, 10, {"vision": 661, "prefill": 3038, "denoise": 7.4}),
        (PI0, 2, 20, 10, {"vision": 440, "prefill": 2032}),
        (PI05, 3, 20, 10, {"vision": 661, "prefill": 3038, "denoise": 7.4}),
        (PI05, 3, 200, 50, {"vision": 661, "prefill": 3756, "denoise": 38.7}),
    ],
)
def test_operations(config: ModelConfig, cameras: int, prompt: int, horizon: int, gflop: dict[str, float]):
    found = work(config, cameras, [prompt], horizon)
    for stage, expected in gflop.items():
        assert found[stage].flops / 1e9 == pytest.approx(expected, rel=0.005), stage


def test_bytes_are_weights_cache_and_what_goes_in_and_out():
    stages, tokens = work(PI0, 3, [20], 10), 3 * 256 + 20
    megabytes = {name: stage.bytes_moved / 1e6 for name, stage in stages.items()}
    pictures = 2 * 768 * (3 * 14 * 14 + 2048) / 1e6
    assert megabytes["vision"] == pytest.approx(829 + pictures, rel=1e-3)
    cache = 18 * tokens * 2 * 256 * 2 / 1e6
    assert cache == pytest.approx(14.5, abs=0.05)
    assert megabytes["prefill"] == pytest.approx(3746 + cache + 2 * tokens * 2048 / 1e6, rel=1e-3)
    assert megabytes["denoise"] == pytest.approx(640, rel=2e-3)


def test_weights_are_those_of_the_model():
    """Read once: SigLIP; Gemma but for the queries, output and MLP of its last layer; no embedding table."""
    stages = work(PI0, 3, [20], 10)
    siglip = 27 * (4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152)
    siglip += 588 * 1152 + 1152 + 256 * 1152 + 1152 * 2048 + 2048
    assert stages["vision"].bytes_moved == 2 * (siglip + 768 * (588 + 2048))
    layer = 2048 * (2048 + 512) + 2048 * 2048 + 3 * 2048 * 16384
    prefill = 17 * layer + 2048 * 512
    assert stages["prefill"].bytes_moved == 2 * (prefill + 788 * (18 * 512 + 2048))


def test_steps_are_counted_not_multiplied():
    few, many = (work(PI0, 3, [20], 10, steps)["denoise"] for steps in (1, 10))
    assert (few.flops, few.bytes_moved) == (many.flops, many.bytes_moved)
    assert (few.count, many.count) == (1, 10)
    assert work(PI0, 3, [20], 10)["vision"].count == 1


def test_floor_of_the_default_workload_on_an_h200():
    floor = floor_ms(policy_work(PI0, 3, [20], 10, 10), H200)
    assert sum(floor.values()) == pytest.approx(6.18, rel=0.015)
    assert floor["vision"] == pytest.approx(0.838, rel=0.01)
    assert floor["prefill"] == pytest.approx(3.855, rel=0.01)
    assert floor["denoise"] == pytest.approx(1.488, rel=0.01)


def test_floor_takes_the_larger_of_arithmetic_and_memory():
    stages = [StageWork("arithmetic", 8e9, 1e6), StageWork("memory", 1e9, 8e6, count=3)]
    assert floor_ms(stages, Ceilings(bytes_per_s=1e9, flops_per_s=1e12)) == pytest.approx(
        {"arithmetic": 8.0, "memory": 24.0}
    )


def test_step_waits_for_memory_and_prefill_for_arithmetic():
    stages = work(PI0, 3, [20], 10)
    balance = H200.flops_per_s / H200.bytes_per_s
    assert stages["denoise"].flops / stages["denoise"].bytes_moved < balance
    assert stages["prefill"].flops / stages["prefill"].bytes_moved > balance


@pytest.mark.parametrize("config", [PI0, PI05, tiny(), tiny(pi05=True)])
def test_rows_of_a_batch_add_their_operations_and_share_the_weights(config: ModelConfig):
    one, other, both = (work(config, 2, prompts, 10) for prompts in ([20], [48], [20, 48]))
    rest = work(config, 2, [20, 20], 10)
    for stage in both:
        assert both[stage].flops == pytest.approx(one[stage].flops + other[stage].flops)
        assert both[stage].bytes_moved < one[stage].bytes_moved + other[stage].bytes_moved
        # A second row costs no weights: what it adds is the same as any row like it adds.
        own = rest[stage].bytes_moved - one[stage].bytes_moved
        thrice = work(config, 2, [20, 20, 20], 10)[stage].bytes_moved
        assert thrice - rest[stage].bytes_moved == pytest.approx(own)


def test_prompts_of_a_batch_are_counted_by_their_real_length():
    assert work(PI0, 3, [10, 30], 10)["prefill"].flops > work(PI0, 3, [10, 10], 10)["prefill"].flops


def test_longer_is_more():
    base = work(PI0, 2, [20], 10)
    for more in (work(PI0, 3, [20], 10), work(PI0, 2, [21], 10)):
        for stage in ("prefill", "denoise"):
            assert more[stage].flops > base[stage].flops
            assert more[stage].bytes_moved > base[stage].bytes_moved
    longer = work(PI0, 2, [20], 11)
    assert longer["denoise"].flops > base["denoise"].flops
    assert longer["prefill"] == base["prefill"]


def test_without_cameras_there_is_no_vision():
    stages = work(PI0, 0, [20], 10)
    assert (stages["vision"].flops, stages["vision"].bytes_moved) == (0, 0)
    assert stages["prefill"].flops > 0
    assert floor_ms(list(stages.values()), H200)["vision"] == 0


def test_values_of_four_bytes_move_twice_as_much():
    narrow, wide = (policy_work(PI0, 3, [20], 10, 10, size) for size in (2, 4))
    assert all(b.bytes_moved == 2 * a.bytes_moved and a.flops == b.flops for a, b in zip(narrow, wide, strict=True))


def test_state_token_is_read_but_not_computed():
    """Its keys and values do not depend on the step: Pi0 attends to one key more than Pi0.5 in each of 18 layers."""
    pi0, pi05 = (work(config, 3, [20], 10)["denoise"] for config in (PI0, PI05))
    extra_mlp = 2 * 10 * 1024 * 1024
    extra_attention = 18 * 4 * 10 * 1 * 2048
    assert pi0.flops - pi05.flops == pytest.approx(extra_mlp + extra_attention)


# ---- what a run says of it

ROOFS = Rooflines(H200, Ceilings(bytes_per_s=4.2e12, flops_per_s=663e12))


def test_floors_of_burst_and_sustained_ceilings():
    stages = policy_work(PI0, 3, [20], 10, 10)
    found = least_time(stages, stages, ROOFS)
    assert found["roofline/floor_ms"] == pytest.approx(6.18, rel=0.015)
    assert found["roofline/floor_sustained_ms"] == pytest.approx(7.1, rel=0.015)
    for name in ("floor_ms", "floor_sustained_ms"):
        parts = [found[f"roofline/{name}_{stage}"] for stage in ("vision", "prefill", "denoise")]
        assert sum(parts) == pytest.approx(found[f"roofline/{name}"])
    assert found["roofline/flops"] == pytest.approx((661 + 3038 + 74) * 1e9, rel=0.005)
    assert found["roofline/stack_floor_ms"] == found["roofline/floor_ms"]


def test_stack_that_does_more_has_another_floor_of_its_own():
    least, own = policy_work(PI0, 2, [20], 10, 10), policy_work(PI0, 3, [20], 10, 10)
    found = least_time(least, own, ROOFS)
    assert found["roofline/floor_ms"] == pytest.approx(sum(floor_ms(least, H200).values()))
    assert found["roofline/stack_floor_ms"] == pytest.approx(sum(floor_ms(own, H200).values()))
    assert found["roofline/stack_flops"] > found["roofline/flops"]
    assert found["roofline/stack_bytes"] > found["roofline/bytes"]


def test_shares_of_the_call_and_of_each_stage_that_was_timed():
    metrics = {"roofline/floor_ms": 6.0, "roofline/floor_sustained_ms": 7.0, "latency_ms/p50": 12.0}
    assert shares(metrics) == pytest.approx({"roofline/share": 0.5, "roofline/share_sustained": 7 / 12})
    metrics |= {"roofline/floor_ms_vision": 1.0, "roofline/floor_sustained_ms_vision": 1.5, "stage_ms/vision": 4.0}
    metrics |= {"roofline/floor_ms_prefill": 4.0, "roofline/floor_sustained_ms_prefill": 4.5, "stage_ms/other": 1.0}
    found = shares(metrics)
    assert (found["roofline/share_vision"], found["roofline/share_sustained_vision"]) == (0.25, 0.375)
    assert not any("prefill" in name or "other" in name for name in found)


def test_plot_shows_roofs_and_points():
    timed = {"latency_ms/p50": 15.0, "stage_ms/vision": 2.0, "stage_ms/prefill": 7.0}
    stages = policy_work(PI0, 3, [20], 10, 10)
    text = roofline_svg(stages, ROOFS, timed)
    assert text == roofline_svg(stages, ROOFS, timed), "the same run, the same bytes"
    root = ElementTree.fromstring(text)
    words = " ".join("".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text"))
    for expected in ("FLOP per byte", "TFLOP/s", "burst", "sustained", "vision 42 %", "prefill 55 %", "call 41 %"):
        assert expected in words, words
    assert "denoise" not in words
    assert len(text) < 40_000, "it is kept with every result"


def test_points_of_the_plot():
    stages = [StageWork("vision", 8e9, 1e6), StageWork("denoise", 1e9, 8e6, count=10), StageWork("nothing", 0, 0)]
    timed = {"latency_ms/p50": 4.0, "stage_ms/vision": 2.0, "stage_ms/denoise": 2.0, "stage_ms/nothing": 1.0}
    found = placed(stages, timed)
    assert found["vision"] == pytest.approx((8e3, 4e12))
    assert found["denoise"] == pytest.approx((125, 5e12))
    assert found["call"] == pytest.approx((18e9 / 81e6, 4.5e12))
    assert set(found) == {"vision", "denoise", "call"}


def test_roof_bends_at_the_ridge():
    ridge = H200.flops_per_s / H200.bytes_per_s
    assert roof(H200, ridge / 2) == pytest.approx(H200.flops_per_s / 2)
    assert roof(H200, ridge * 2) == H200.flops_per_s
