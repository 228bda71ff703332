"""Tensors gathered by their addresses: under Triton's interpreter everywhere, on a GPU from both sides of the bus."""

import json
import sys
from pathlib import Path

import interpreter
import pytest
import torch
from interpreter import interprets
from torch import Tensor

from pi0exp.kernels.gather import gather

SIZES = [10001, 200, 8192, 3, 16, 6]
"""Bytes: more than a program takes, words, and less than one."""


def wrong(device: torch.device, shift: int, pinned: bool = False) -> list[int]:
    """Which of the tensors did not arrive, each `shift` bytes behind where a word begins; -1: the mail's answer."""
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randint(0, 256, (size + shift,), generator=generator, dtype=torch.uint8) for size in SIZES]
    sources = [source.pin_memory() if pinned else source.to(device) for source in sources]
    wanted = [source[shift:].cpu() for source in sources]
    starts = [256 * i + sum(SIZES[:i]) // 256 * 256 for i in range(len(SIZES))]

    def told(values: list[int]) -> Tensor:
        made = torch.tensor(values, dtype=torch.int64)
        return made.pin_memory() if device.type == "cuda" else made

    table, mail = told([source.data_ptr() + shift for source in sources]), told([7, 6])
    places = torch.tensor(list(zip(starts, SIZES, strict=True)), device=device)
    out = torch.zeros(starts[-1] + SIZES[-1], dtype=torch.uint8, device=device)
    gather(table, places, out, mail, max(SIZES))
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = [out[start : start + size].cpu() for start, size in zip(starts, SIZES, strict=True)]
    failed = [i for i, pair in enumerate(zip(found, wanted, strict=True)) if not torch.equal(*pair)]
    untouched = sum(int(out[a + n : b].sum()) for a, n, b in zip(starts, SIZES, starts[1:], strict=False)) == 0
    return failed + ([] if mail.tolist() == [7, 7] and untouched else [-1])


@interprets
def test_interpreted():
    assert interpreter.lines(Path(__file__), timeout_s=120) == [[], [], []]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use; this machine has none")
@pytest.mark.parametrize("pinned", [False, True], ids=["device", "pinned"])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_on_a_gpu(shift: int, pinned: bool):
    assert wrong(torch.device("cuda", 0), shift, pinned) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [({0: torch.zeros(3, dtype=torch.int32)}, "int64"), ({1: torch.zeros(3, 3, dtype=torch.int64)}, "places are")],
)
def test_what_does_not_fit_is_refused(change: dict[int, Tensor], why: str):
    three = torch.zeros(3, dtype=torch.int64)
    given = [three, torch.zeros(3, 2, dtype=torch.int64), torch.zeros(9, dtype=torch.uint8), three[:2]]
    for position, tensor in change.items():
        given[position] = tensor
    with pytest.raises(ValueError, match=why):
        gather(*given, 3)


if __name__ == "__main__":
    for shift in (0, 1, 4):
        print(json.dumps(wrong(torch.device("cpu"), shift)))
    sys.exit(0)
