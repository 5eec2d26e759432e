"""torch's own table of inputs of scaled_dot_product_attention: outputs, gradients, vmap."""

import pytest
import torch
import torch.nn.functional as F
from sdpa_ways import outcome, overridden
from torch.func import grad, vmap
from torchs_samples import samples

from clinattn import fused_attention

WAYS = {"fused_attention": fused_attention, "override": overridden}


SAMPLES, WITH_DROPOUT = range(7), range(6)  # as many as there are
IN_DIMS = [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, None), (None, None, 1), (0, 1, 1)]


def test_no_sample_is_left_out():
    assert (len(samples()), len(samples(dropout=True))) == (len(SAMPLES), len(WITH_DROPOUT))


@pytest.mark.parametrize("way", ["fused_attention", "override"])
@pytest.mark.parametrize("number", SAMPLES)
def test_torchs_samples_forward_and_gradient(number, way):
    inputs, words = samples()[number]
    ours = outcome(WAYS[way], inputs, **words)
    theirs = outcome(F.scaled_dot_product_attention, inputs, **words)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("number", SAMPLES)
def test_torchs_samples_by_gradcheck(number):
    inputs, words = samples()[number]
    function = lambda *inputs: fused_attention(*inputs, **words)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("number", SAMPLES)
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_torchs_samples_by_vmap(number, in_dims):
    """vmap and vmap of a gradient are the loop."""
    inputs, words = samples()[number]
    stacked = []
    for x, dim in zip(inputs, in_dims, strict=True):
        x = x.detach()
        stacked.append(x if dim is None else torch.stack([x, x + 1, 2 * x], dim))
    call = lambda *inputs: fused_attention(*inputs, **words)
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


@pytest.mark.parametrize("number", WITH_DROPOUT)
def test_torchs_samples_with_dropout(number):
    """The pairs that are dropped are ours: the shape, and a gradient of the same pairs."""
    inputs, words = samples(dropout=True)[number]

    def call(*inputs):
        torch.manual_seed(7)
        return fused_attention(*inputs, **words)

    assert call(*inputs).shape == F.scaled_dot_product_attention(*inputs, **words).shape
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
