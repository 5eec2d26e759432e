"""The problems that a GPU run checks keep all their tensors on its device (lib/card.py)."""

from __future__ import annotations

import pytest
import torch
from card import OnCard, StandInCard
from cases import CASES, FEATURES
from support import Problem

NAMES = (
    "causal gqa lengths-window mask-float-bhqk mask-left-padding-window mask-grad-qk packed "
    "packed-tail packed-many-short packed-lse-only alibi-packed relative decay-packed "
    "dropout-packed segments prefix-packed everything-packed"
).split()
PROBLEMS = [case for case in (*CASES, *FEATURES) if case.id in NAMES]


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_problems_stay_on_their_device(case):
    numbers = Problem(case, torch.float16)
    with StandInCard():
        problem = Problem(case, torch.float16, "meta")
        truth, naive = problem.truth, problem.naive
    for name, x in truth.items():
        assert isinstance(x, OnCard) and torch.equal(x.numbers, numbers.truth[name])
    assert len(naive) == len(numbers.naive)


def test_two_devices_in_one_operator_are_an_error():
    with StandInCard():
        x = torch.ones(3, device="meta")
        y = torch.arange(3.0)
        assert x.device == OnCard(y).device != y.device
        for fails in (lambda: x + y, lambda: torch.where(y > 1, x, x), lambda: x.add_(y)):
            with pytest.raises(RuntimeError, match="at least two devices"):
                fails()
        assert (x + y.to("meta") + 1).cpu().tolist() == [2, 3, 4]
        assert x[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
        assert (x * torch.tensor(2.0)).sum().item() == 6
