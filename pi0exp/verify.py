"""Does it still compute the same actions? Every option is held to the numerics it declares, against the plain model.

The truth is the plain model in wider arithmetic with the very same weights: for bf16 float32 (TF32 off) over the
bf16 policy's rounded weights and RoPE frequencies, for fp32 float64 on models that are small enough for it.

  EXACT        bitwise equal to the policy as it was just before this option
  REORDERED    relative L2 error of the actions at most 2 x the plain model's own on every observation, and at most
               1.25 x in the geometric mean. Harmless reorderings scatter between 0.7 x and 1.4 x on single
               observations, because bf16 rounding noise is as large as the error itself.
  APPROXIMATE  finite; the error is shown, and within the bound that the option states, if it states one

The stack as a whole is held against the plain model at the level of its weakest option.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pi0exp.option import Numerics
from pi0exp.subject import Verdict

SINGLE_RATIO, MEAN_RATIO = 2.0, 1.25
FP32_LIMIT = 5e-6
"""Relative L2 limit of fp32: harmless orders of summation reach 1.1e-6, the smallest mistake seen makes 8e-6."""


def rel_l2(found: Tensor, truth: Tensor) -> list[float]:
    """norm(found - truth) / norm(truth) of every row of a batch, in float64."""
    found, truth = found.double().flatten(1), truth.double().flatten(1)
    ratios: list[float] = ((found - truth).norm(dim=1) / truth.norm(dim=1)).tolist()
    return ratios


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of errors or ratios, all >= 0. Zero where one of them is."""
    return math.exp(sum(map(math.log, values)) / len(values)) if all(values) else 0.0


def unequal(before: Sequence[Tensor], after: Sequence[Tensor], of: str = "actions") -> str:
    """How an option that declared EXACT changed the actions, or whatever it is of; empty if it did not."""
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]
    if not changed:
        return ""
    largest = max((before[i].double() - after[i].double()).abs().max().item() for i in changed)
    return f"declared EXACT, but changed {len(changed)} of {len(before)} observations' {of}, by up to {largest:.3g}"


def judge(
    found: Sequence[Tensor],
    plain: Sequence[Tensor],
    truth: Sequence[Tensor],
    numerics: Numerics,
    precision: str,
    exact_failures: Sequence[str] = (),
    bound: float | None = None,
    kinds: Sequence[str] = (),
    of: str = "actions",
) -> Verdict:
    """Hold the actions of the stack, `found`, against the plain model's and the truth's: each a list of [B, C, A].

    `precision` is the name of the plain model's; fp32 has an absolute limit, all others are relative to that model.
    kinds: names of as many equal parts of the lists, whose errors are told apart, too: error/rel_l2_<kind>. `of`: what
    they are, for reasons. `bound`: the relative L2 error that an APPROXIMATE stack allows itself on each observation.
    """
    for whose, given in (("", found), ("plain model's ", plain), ("truth's ", truth)):
        if not all(torch.isfinite(actions).all() for actions in given):
            return Verdict([f"the {whose}{of} are not finite", *exact_failures])
    errors = [error for pair in zip(found, truth, strict=True) for error in rel_l2(*pair)]
    own = [error for pair in zip(plain, truth, strict=True) for error in rel_l2(*pair)]
    metrics = {
        "error/rel_l2": geometric_mean(errors),
        f"error/rel_l2_plain_{precision}": geometric_mean(own),
        "error/max_abs": max((a.double() - b.double()).abs().max().item() for a, b in zip(found, truth, strict=True)),
    }
    if kinds and len(errors) % len(kinds) == 0:
        part = len(errors) // len(kinds)
        parts = {kind: errors[i * part : (i + 1) * part] for i, kind in enumerate(kinds)}
        metrics |= {f"error/rel_l2_{kind}": geometric_mean(values) for kind, values in parts.items()}
    wrong = list(exact_failures)
    if numerics is Numerics.EXACT and (difference := unequal(plain, found, of)):
        wrong.append(f"the whole stack {difference}")
    if numerics is Numerics.APPROXIMATE and bound is not None and max(errors) > bound:
        wrong.append(f"relative L2 error {max(errors):.3g} of the {of} is above the bound {bound:g} that was stated")
    if precision == "fp32" and numerics is not Numerics.APPROXIMATE:
        if max(errors) > FP32_LIMIT:
            wrong.append(f"relative L2 error {max(errors):.3g} of the {of} is above the limit {FP32_LIMIT:g} of fp32")
    elif numerics is Numerics.REORDERED or all(own):
        # A plain model without any error is itself the truth; to be a multiple of that says nothing.
        ratios = [error / max(base, 1e-300) for error, base in zip(errors, own, strict=True)]
        metrics |= {"error/ratio_max": max(ratios), "error/ratio_mean": geometric_mean(ratios)}
        if numerics is Numerics.REORDERED:
            for value, limit, where in (
                (max(ratios), SINGLE_RATIO, "on one observation"),
                (geometric_mean(ratios), MEAN_RATIO, "in the geometric mean"),
            ):
                if value > limit:
                    wrong.append(f"{value:.2f} x the plain model's own error {where} (limit {limit:g})")
    return Verdict(wrong, metrics)
