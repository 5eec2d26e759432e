"""The two ways in which clinattn is under torch's attention, for tests of each."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from clinattn.integrations.torch import sdpa


@contextmanager
def activated():
    sdpa.register()
    activate_flash_attention_impl("clinattn")
    try:
        yield
    finally:
        restore_flash_attention_impl()


WAYS = {"activated": activated, "block": sdpa.sdpa}


def overridden(*args, **words) -> Tensor:
    """F.scaled_dot_product_attention in a block of clinattn's."""
    with sdpa.sdpa():
        return F.scaled_dot_product_attention(*args, **words)


def outcome(function, inputs, **words) -> tuple[Tensor, ...]:
    """(o, dq, dk, dv) of an attention function, for a cotangent that differs by element."""
    o = function(*inputs, **words)
    do = torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)
    return o, *torch.autograd.grad(o, inputs, do)


both_ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
