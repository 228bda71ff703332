"""Masks whose keys are put together only when somebody asks.

Shapes: B batch, S keys before the queries, T queries.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pi0exp.image_masking.ignore import everything_and_itself
from pi0exp.model.mask import Mask, suffix_mask

VALID_BS = torch.tensor([[True, True, False], [True, False, False]])


class Count(TorchDispatchMode):
    """How many operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("blind", [False, True])
def test_the_suffix_sees_what_is_real_and_itself(full: bool, blind: bool):
    valid_BS = VALID_BS | full
    keys_BS = torch.cat([valid_BS, torch.ones(2, 2, dtype=torch.bool)], dim=1)
    found, wanted = suffix_mask(valid_BS, 2, full, blind), Mask(keys_BS, 2, full=full, blind=blind)
    assert torch.equal(found.keys_BS, keys_BS)
    assert torch.equal(found.dense(), wanted.dense())
    assert torch.equal(found.additive(torch.float32), wanted.additive(torch.float32))


def test_nothing_is_launched_for_keys_that_nobody_asks_for():
    real_BS = torch.ones_like(VALID_BS)
    with Count() as count:
        mask = suffix_mask(real_BS, 2, True, True)
        assert mask.full
        assert count.operations == 0
        assert mask.keys_BS.all()
        assert count.operations > 0
    with Count() as count:
        suffix_mask(VALID_BS, 2, False, True)
    assert count.operations == 2  # ones, and the keys in front of them


def test_without_masks_everything_counts_as_real():
    mask = everything_and_itself(VALID_BS, 2, False, True)
    assert mask.full
    assert mask.visible().all()
    assert mask.visible().shape == (2, 2, 5)
