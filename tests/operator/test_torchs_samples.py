"""torch's own table of inputs of scaled_dot_product_attention: outputs, gradients, vmap."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sdpa_ways import outcome, overridden
from torch.func import grad, vmap
from torchs_samples import samples

from clinattn import fused_attention

WAYS = {"fused_attention": fused_attention, "override": overridden}


# A release of torch has seven or more samples, and six or more with dropout: a test takes each
# seventh.
PARTS = 7
IN_DIMS = [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, None), (None, None, 1), (0, 1, 1)]


def test_no_part_is_empty():
    assert len(samples()) >= PARTS and len(samples(dropout=True)) >= PARTS - 1


@pytest.mark.parametrize("way", ["fused_attention", "override"])
@pytest.mark.parametrize("part", range(PARTS))
def test_torchs_samples_forward_and_gradient(part, way):
    for inputs, words in samples()[part::PARTS]:
        ours = outcome(WAYS[way], inputs, **words)
        theirs = outcome(F.scaled_dot_product_attention, inputs, **words)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("part", range(PARTS))
def test_torchs_samples_by_gradcheck(part):
    for inputs, words in samples()[part::PARTS]:
        function = partial(fused_attention, **words)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_torchs_samples_by_vmap(part, in_dims):
    """vmap and vmap of a gradient are the loop."""
    for inputs, words in samples()[part::PARTS]:
        check_vmap(partial(fused_attention, **words), inputs, in_dims)


def check_vmap(call, inputs, in_dims):
    stacked = []
    for x, dim in zip(inputs, in_dims, strict=True):
        x = x.detach()
        stacked.append(x if dim is None else torch.stack([x, x + 1, 2 * x], dim))
    of_loss = grad(lambda *inputs: call(*inputs).square().sum(), argnums=(0, 1, 2))
    for function in (call, of_loss):
        mapped = vmap(function, in_dims=in_dims)(*stacked)
        one_by_one = [
            function(
                *(x if d is None else x.select(d, i) for x, d in zip(stacked, in_dims, strict=True))
            )
            for i in range(3)
        ]
        if function is of_loss:
            for x, *each in zip(mapped, *one_by_one, strict=True):
                torch.testing.assert_close(x, torch.stack(each))
        else:
            torch.testing.assert_close(mapped, torch.stack(one_by_one))


@pytest.mark.parametrize("part", range(PARTS - 1))
def test_torchs_samples_with_dropout(part):
    """The pairs that are dropped are ours: the shape, and a gradient of the same pairs."""
    for inputs, words in samples(dropout=True)[part :: PARTS - 1]:
        call = partial(seeded, words)
        assert call(*inputs).shape == F.scaled_dot_product_attention(*inputs, **words).shape
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def seeded(words, *inputs):
    torch.manual_seed(7)
    return fused_attention(*inputs, **words)
