"""The judge: every rule from both sides of its limit, and the mistakes that the golden data lists.

Shapes: B batch, C horizon, A action dim.
"""

import math
from functools import cache
from typing import Any

import pytest
import torch
from golden import BF16_CASES, load_model, noise_of, num_steps_of, observation_of
from test_mutations import EFFECTS, MISTAKES, UNMEASURED, column_of
from torch import Tensor

from pi0exp.model.precision import BF16, BF16_TRUTH, Precision
from pi0exp.option import Numerics
from pi0exp.subject import Verdict
from pi0exp.verify import FP32_LIMIT, MEAN_RATIO, SINGLE_RATIO, geometric_mean, judge, rel_l2, unequal

EXACT, REORDERED, APPROXIMATE = Numerics

# ---- measures


def test_error_of_every_row():
    truth_BCA = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    found_BCA = torch.tensor([[[3.0, 4.0]], [[1.0, 2.0]]])
    assert rel_l2(found_BCA, truth_BCA) == [0.0, 0.5]


def test_error_is_taken_in_float64():
    """In float32 the difference of neighbours is exact, but its square would be lost beside 1e38."""
    truth_BCA = torch.tensor([[[1e30, 1.0]]])
    assert rel_l2(truth_BCA * 2, truth_BCA) == [1.0]


def test_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([5.0]) == pytest.approx(5.0)
    assert geometric_mean([0.0, 1.0]) == 0


def test_unequal_counts_and_measures():
    before = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3)]
    assert unequal(before, [tensor.clone() for tensor in before]) == ""
    after = [before[0], before[1].clone()]
    after[1][0, 1, 2] += 0.25
    text = unequal(before, after)
    assert "changed 1 of 2 observations' actions, by up to 0.25" in text


def test_unequal_sees_the_last_bit_and_nan():
    ones = torch.ones(1, 1, 1)
    assert unequal([ones], [torch.nextafter(ones, 2 * ones)])
    assert unequal([ones], [ones * math.nan])
    assert unequal([ones * math.nan], [ones * math.nan]), "not a number is never the same"


# ---- the judge, on actions made to have given errors

TRUTH = torch.tensor([[[3.0, 4.0]]])


def off_by(*errors: float) -> list[Tensor]:
    """One observation an error: actions with that relative L2 error."""
    return [TRUTH * (1 + error) for error in errors]


def verdict(found: list[float], plain: list[float], numerics: Numerics, precision: str = "bf16") -> Verdict:
    assert len(found) == len(plain)
    return judge(off_by(*found), off_by(*plain), [TRUTH] * len(found), numerics, precision)


def test_metrics():
    made = verdict([0.02, 0.02], [0.01, 0.04], REORDERED)
    expected = {
        "error/rel_l2": 0.02,
        "error/rel_l2_plain_bf16": 0.02,
        "error/max_abs": 0.08,
        "error/ratio_max": 2.0,
        "error/ratio_mean": 1.0,
    }
    assert made.metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("share", "caught"),
    [(0.99, False), (1.01, True)],
)
def test_limit_of_a_single_observation(share: float, caught: bool):
    # The others are so good that the mean has no say.
    made = verdict([0.01 * SINGLE_RATIO * share, 0.001, 0.001], [0.01] * 3, REORDERED)
    assert [("on one observation" in text) for text in made.wrong] == ([True] if caught else [])


@pytest.mark.parametrize(
    ("share", "caught"),
    [(0.99, False), (1.01, True)],
)
def test_limit_of_the_mean(share: float, caught: bool):
    made = verdict([0.01 * MEAN_RATIO * share] * 3, [0.01] * 3, REORDERED)
    assert [("in the geometric mean" in text) for text in made.wrong] == ([True] if caught else [])


def test_better_than_plain_is_right():
    assert verdict([0.001, 0.0], [0.01, 0.01], REORDERED).wrong == []


def test_both_limits_are_told():
    assert len(verdict([0.05], [0.01], REORDERED).wrong) == 2


def test_every_observation_is_held_against_its_own_plain_error():
    """Where the plain model is exact to 0.001, 0.01 is wrong, whatever it is elsewhere."""
    made = verdict([0.01, 0.002, 0.002, 0.002], [0.001, 0.1, 0.1, 0.1], REORDERED)
    assert len(made.wrong) == 1
    assert "on one observation" in made.wrong[0]


def test_one_wrong_row_of_a_batch_is_found():
    torch.manual_seed(0)
    truth_BCA = torch.randn(8, 10, 32)
    plain_BCA = truth_BCA * 1.01
    found_BCA = plain_BCA.clone()
    assert judge([found_BCA], [plain_BCA], [truth_BCA], REORDERED, "bf16").wrong == []
    found_BCA[5] = truth_BCA[5] * 1.03
    (text,) = judge([found_BCA], [plain_BCA], [truth_BCA], REORDERED, "bf16").wrong
    assert text.startswith("3.00 x the plain model's own error on one observation")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_swapped_rows_are_found(precision: str):
    torch.manual_seed(0)
    truth_BCA = torch.randn(2, 10, 32)
    plain_BCA = truth_BCA * (1 + 1e-6)
    assert judge([plain_BCA.flip(0)], [plain_BCA], [truth_BCA], REORDERED, precision).wrong


@pytest.mark.parametrize("share", [0.99, 1.01])
@pytest.mark.parametrize("numerics", [EXACT, REORDERED])
def test_limit_of_fp32(numerics: Numerics, share: float):
    """Absolute: where the plain model is exact by luck, twice nothing would be nothing."""
    truth = TRUTH.double()
    found = truth * (1 + FP32_LIMIT * share)
    plain = found if numerics is EXACT else truth * (1 + 1e-9)
    made = judge([truth, found], [truth, plain], [truth, truth], numerics, "fp32")
    assert bool(made.wrong) == (share > 1)
    assert all("above the limit 5e-06 of fp32" in text for text in made.wrong)
    assert "error/ratio_max" not in made.metrics


def test_approximate_is_free_in_every_precision():
    for precision in ("bf16", "fp32"):
        made = verdict([0.5], [1e-7], APPROXIMATE, precision)
        assert made.wrong == []
        assert made.metrics["error/rel_l2"] == pytest.approx(0.5)


def test_no_multiples_of_a_plain_model_without_error():
    metrics = verdict([0.5, 0.5], [0.0, 0.01], APPROXIMATE, "fp32").metrics
    assert metrics["error/rel_l2_plain_fp32"] == 0
    assert "error/ratio_max" not in metrics
    assert verdict([1e-3], [0.0], REORDERED).wrong, "with a bound to hold it has to be one"


def test_exact_stack_equals_plain():
    assert verdict([0.01, 0.02], [0.01, 0.02], EXACT).wrong == []
    (text,) = verdict([0.01, 0.0200001], [0.01, 0.02], EXACT).wrong
    assert text.startswith("the whole stack declared EXACT, but changed 1 of 2")


def test_reordered_stack_need_not_equal_plain():
    assert verdict([0.011], [0.01], REORDERED).wrong == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("numerics", list(Numerics))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_actions_that_are_not_finite_are_wrong(value: float, numerics: Numerics, precision: str):
    found = [TRUTH, TRUTH.clone()]
    found[1][0, 0, 1] = value
    assert judge(found, [TRUTH] * 2, [TRUTH] * 2, numerics, precision).wrong == ["the actions are not finite"]


@pytest.mark.parametrize(("whose", "position"), [("plain model's", 1), ("truth's", 2)])
def test_nothing_is_right_beside_a_reference_that_is_not_finite(whose: str, position: int):
    """Every comparison with not-a-number is false, so no limit would be passed."""
    given = [[TRUTH], [TRUTH * 1.01], [TRUTH]]
    given[position] = [TRUTH * math.nan]
    assert judge(*given, REORDERED, "bf16").wrong == [f"the {whose} actions are not finite"]


@pytest.mark.parametrize("numerics", list(Numerics))
@pytest.mark.parametrize("found", [TRUTH, TRUTH * math.nan], ids=["finite", "nan"])
def test_broken_words_are_passed_on(numerics: Numerics, found: Tensor):
    made = judge([found], [TRUTH], [TRUTH], numerics, "bf16", ["graphs broke its word"])
    assert "graphs broke its word" in made.wrong


def test_lists_of_different_length_are_a_mistake_of_ours():
    with pytest.raises(ValueError, match="zip"):
        judge([TRUTH], [TRUTH, TRUTH], [TRUTH], REORDERED, "bf16")


# ---- mistakes of implementations in bf16, by the golden data

MODELS = ("pi0", "pi05")


def cases_of(model: str) -> list[str]:
    return [case for case in BF16_CASES if case.startswith(f"tiny_{model}_")]


def actions(case: str, precision: Precision, mistake: str | None, patch: pytest.MonkeyPatch) -> Tensor:
    model, observation = load_model(case, precision), observation_of(case)
    if mistake is not None:
        observation = MISTAKES[mistake](patch.setattr, model, observation) or observation
    with torch.inference_mode():
        return model.sample_actions(observation, noise_of(case), num_steps_of(case))


@cache
def references(model: str) -> tuple[list[Tensor], list[Tensor]]:
    """The plain bf16 model's actions and the truth."""
    with pytest.MonkeyPatch.context() as patch:
        plain, truth = (
            [actions(case, precision, None, patch) for case in cases_of(model)] for precision in (BF16, BF16_TRUTH)
        )
    return plain, truth


def effect(mistake: str, model: str) -> float:
    """The largest effect of the mistake on the actions of the original in float32: 0 where it does not apply."""
    if mistake in UNMEASURED:
        return 1.0
    if mistake == "bf16-rounded RoPE frequencies in fp32":
        return 0.0  # what the bf16 policy does
    cells = [EFFECTS[mistake][column_of(case.removesuffix("_bf16") + "_fp32")] for case in cases_of(model)]
    return max(0.0 if cell in ("-", "not seen") else float(cell) for cell in cells)


VISIBLE = 5e-3
"""The error of bf16 itself is 5e-3 to 2e-2; mistakes of less than 1e-3 drown in it and are caught in fp32."""


def judged(model: str, mistake: str) -> Verdict:
    found = []
    for case in cases_of(model):
        with pytest.MonkeyPatch.context() as patch:
            found.append(actions(case, BF16, mistake, patch))
    return judge(found, *references(model), REORDERED, "bf16")


def test_effects_are_far_from_where_the_line_is_drawn():
    effects = [effect(mistake, model) for mistake in MISTAKES for model in MODELS]
    assert not [value for value in effects if VISIBLE / 5 < value < VISIBLE]
    assert sum(value >= VISIBLE for value in effects) > 70


@pytest.mark.parametrize("model", MODELS)
def test_the_model_itself_is_right(model: str):
    plain, truth = references(model)
    made = judge(plain, plain, truth, REORDERED, "bf16")
    assert made.wrong == []
    assert 3e-3 < made.metrics["error/rel_l2"] < 3e-2


def visible() -> list[Any]:
    """Mistakes with the models in which they show; of those that show in both only one is quick, now this, now that."""
    found = []
    for i, name in enumerate(MISTAKES):
        models = [model for model in MODELS if effect(name, model) >= VISIBLE]
        quick = models[i % len(models)] if models else None
        found += [pytest.param(model, name, marks=[pytest.mark.slow] * (model != quick)) for model in models]
    return found


@pytest.mark.parametrize(("model", "mistake"), visible())
def test_mistake_that_stands_out_of_bf16_is_wrong(model: str, mistake: str):
    assert judged(model, mistake).wrong


@pytest.mark.parametrize("model", MODELS)
def test_mistake_that_drowns_in_bf16_is_not_called_wrong(model: str):
    """The rule lets harmless differences pass: erf GELU moves the actions by 1e-4, a hundredth of bf16's own error."""
    assert judged(model, "erf GELU in Gemma").wrong == []
