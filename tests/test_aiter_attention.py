"""Attention through a fake aiter.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from aiter_fake import FakeAiter, install
from helpers import built, subject_of, tiny_observation, tiny_policy, with_option
from torch import Tensor

from pi0exp import aiter
from pi0exp.attention.aiter_attention import AiterAttention, aiter_attend
from pi0exp.errors import UnsupportedError
from pi0exp.model.layers import Attention, eager_attend
from pi0exp.model.mask import Mask, suffix_mask
from pi0exp.model.precision import BF16
from pi0exp.policy import Policy


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeAiter:
    return install(monkeypatch, tmp_path)


NOTHING_MASKED = ("image_masking=skip", "fusion.rewrites.trim_prompt=true", "workload.num_steps=3")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float) -> Tensor:
    return aiter_attend(q, k, v, mask, scale, flash_attn_func=aiter.attention_module().flash_attn_func)


def qkv(T: int, S: int, N: int = 4, K: int = 1, H: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, heads, H, generator=generator).bfloat16() for n, heads in ((T, N), (S, K), (S, K))]


@pytest.mark.parametrize("scale", [0.25, 0.7])
def test_attention_is_attention(fake: FakeAiter, scale: float):
    """T and S, and the numbers of heads, differ, so that a mixed-up axis cannot pass."""
    q, k, v = qkv(5, 7)
    torch.testing.assert_close(attend(q, k, v, None, scale), eager_attend(q, k, v, None, scale), atol=0.02, rtol=0.02)
    (call,) = fake.called("aiter.flash_attn_func")
    assert call["k"].shape == (2, 7, 1, 16), "the shared head is not copied"
    assert call["softmax_scale"] == scale
    assert fake.flagged == []


def test_state_token_is_an_attention_of_its_own(fake: FakeAiter):
    q, k, v = qkv(5, 9)
    mask = suffix_mask(torch.ones(2, 4, dtype=torch.bool), 5, full=True, blind=True)
    wanted = eager_attend(q, k, v, mask, 0.25)
    torch.testing.assert_close(attend(q, k, v, mask, 0.25), wanted, atol=0.02, rtol=0.02)
    assert not torch.allclose(attend(q, k, v, None, 0.25)[:, 0], wanted[:, 0], atol=0.02), "the mask matters"
    assert [call["k"].shape[1] for call in fake.called("aiter.flash_attn_func")] == [5, 9, 9]


@pytest.mark.parametrize("blind", [False, True])
def test_masked_keys_are_refused(fake: FakeAiter, blind: bool):
    q, k, v = qkv(5, 9)
    mask = suffix_mask(torch.ones(2, 4, dtype=torch.bool), 5, full=False, blind=blind)
    with pytest.raises(UnsupportedError, match=r"image_masking=skip and fusion\.rewrites\.trim_prompt=true"):
        attend(q, k, v, mask, 0.25)
    assert fake.calls == []


def test_causal_mask_is_refused(fake: FakeAiter):
    q, k, v = qkv(5, 9)
    mask = Mask(torch.ones(2, 9, dtype=torch.bool), 5, full=True, causal=True)
    with pytest.raises(UnsupportedError, match="takes no mask"):
        attend(q, k, v, mask, 0.25)


@pytest.mark.parametrize("model", ["tiny", "tiny_pi05"])
def test_policy_computes_the_same_actions(fake: FakeAiter, model: str):
    subject = subject_of(f"model={model}", *NOTHING_MASKED)
    instance = built(with_option(subject, attention=AiterAttention()))
    assert instance.verdict.wrong == []
    assert instance.verdict.metrics["error/ratio_mean"] != 1, "aiter was not in the way"
    assert {line.split(" -> ")[1] for line in instance.applied["attention"]} == {"flash_attn_func of amd-aiter unknown"}
    dims = {call["q"].shape[3] for call in fake.called("aiter.flash_attn_func")}
    assert dims == {72, 32}
    assert fake.flagged == []


def test_policy_refuses_what_it_cannot_mask(fake: FakeAiter):
    policy = tiny_policy(precision=BF16)
    AiterAttention().apply(policy)
    assert policy.sample_actions(tiny_observation(lengths=(8,))).shape == (1, 10, 32)
    for cameras, length in (((1, 1, 1), 5), ((1, 0, 1), 8)):
        with pytest.raises(UnsupportedError, match="takes no mask"):
            policy.sample_actions(tiny_observation((cameras,), (length,)))


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (
            lambda call: (
                lambda q, k, v, **rest: call(q=q.transpose(1, 2), k=k.transpose(1, 2), v=v.transpose(1, 2), **rest)
            ),
            "heads 5 of 16 on 7",
        ),
        (lambda call: lambda softmax_scale, **rest: call(scale=softmax_scale, **rest), "unexpected keyword"),
        (lambda call: lambda **rest: call(**rest, attn_mask=None), "unexpected keyword"),
    ],
)
def test_mistakes_of_an_adapter_are_found(fake: FakeAiter, mistake: Any, error: str):
    q, k, v = qkv(5, 7)
    wrong = mistake(aiter.attention_module().flash_attn_func)
    with pytest.raises((RuntimeError, TypeError), match=error):
        aiter_attend(q, k, v, None, 0.25, flash_attn_func=wrong)


def test_wrong_scale_is_found(fake: FakeAiter):
    @dataclass(frozen=True)
    class Unscaled(AiterAttention):
        def apply_to(self, policy: Policy, stages: tuple[str, ...]) -> None:
            call = aiter.attention_module().flash_attn_func
            wrong = partial(aiter_attend, flash_attn_func=lambda softmax_scale, **rest: call(**rest, softmax_scale=1.0))
            policy.fill(Attention, "attend", wrong, stages, "scores that are not scaled")

    subject = subject_of("model=tiny", *NOTHING_MASKED)
    assert built(with_option(subject, attention=Unscaled())).verdict.wrong


def clashes(*words: str) -> list[str]:
    stack = subject_of("model=tiny", *words).stack
    return [reason for _, part in stack.parts() for reason in part.clashes(stack)]


def test_clashes():
    way_out = "needs image_masking=skip and fusion.rewrites.trim_prompt=true: aiter's attention takes no mask"
    assert clashes("attention=aiter") == [way_out]
    assert clashes("attention=aiter", "image_masking=skip") == [way_out]
    assert clashes("attention=aiter", "fusion.rewrites.trim_prompt=true") == [way_out]
    assert clashes("attention=aiter", *NOTHING_MASKED) == []
    assert clashes("attention=aiter", "image_masking=ignore") == [], "which drops the masks, and says so"
    assert clashes("attention.denoise=aiter") == [way_out]
    assert clashes("attention.vision=aiter") == [], "pictures have no masks"
    assert clashes("attention=aiter", "attention.prefill=sdpa", "attention.denoise=sdpa") == []
    assert clashes("attention.vision=aiter", "precision=fp32") == ["aiter's attention takes bf16 and fp16 only"]


def test_proof_is_the_kernel_that_was_seen():
    """In a recorded trace, once for each of the 18 layers of the prefill; the name is cut there."""
    table = Path(__file__).parent / "data" / "kernel_names.tsv"
    seen = [line.split("\t") for line in table.read_text().splitlines() if AiterAttention().proof() in line]
    assert {line[0] for line in seen} == {"MI350", "MI300X"}
    assert {line[3] for line in seen} == {"18"}
