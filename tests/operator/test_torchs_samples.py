"""torch's own table of inputs of scaled_dot_product_attention: outputs, gradients, vmap."""

import pytest
import torch
import torch.nn.functional as F
from sdpa_ways import outcome, overridden
from torch.func import grad, vmap
from torch.testing._internal.common_methods_invocations import op_db

from clinattn import fused_attention

SDPA = next(x for x in op_db if x.name == "nn.functional.scaled_dot_product_attention")


WAYS = {"fused_attention": fused_attention, "override": overridden}


def samples(dropout=False):
    """Those of the table with dropout, or without; it names each twice."""
    torch.manual_seed(0)
    found = SDPA.sample_inputs("cpu", torch.float64, requires_grad=True)
    found = [x for x in found if bool(x.kwargs.get("dropout_p")) == dropout]
    shapes = lambda x: str([y.shape for y in (x.input, *x.args)]) + str(sorted(x.kwargs))
    return list({shapes(x) + str(x.kwargs.get("is_causal")): x for x in found}.values())


SAMPLES = range(len(samples()))
IN_DIMS = [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, None), (None, None, 1), (0, 1, 1)]


@pytest.mark.parametrize("way", ["fused_attention", "override"])
@pytest.mark.parametrize("number", SAMPLES)
def test_torchs_samples_forward_and_gradient(number, way):
    sample = samples()[number]
    inputs = [sample.input, *sample.args]
    ours = outcome(WAYS[way], inputs, **sample.kwargs)
    theirs = outcome(F.scaled_dot_product_attention, inputs, **sample.kwargs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("number", SAMPLES)
def test_torchs_samples_by_gradcheck(number):
    sample = samples()[number]
    function = lambda *inputs: fused_attention(*inputs, **sample.kwargs)
    assert torch.autograd.gradcheck(function, (sample.input, *sample.args), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (sample.input, *sample.args), fast_mode=True)


@pytest.mark.parametrize("number", SAMPLES)
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_torchs_samples_by_vmap(number, in_dims):
    """vmap and vmap of a gradient are the loop."""
    sample = samples()[number]
    stacked = []
    for x, dim in zip((sample.input, *sample.args), in_dims, strict=True):
        x = x.detach()
        stacked.append(x if dim is None else torch.stack([x, x + 1, 2 * x], dim))
    call = lambda *inputs: fused_attention(*inputs, **sample.kwargs)
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


@pytest.mark.parametrize("number", range(len(samples(dropout=True))))
def test_torchs_samples_with_dropout(number):
    """The pairs that are dropped are ours: the shape, and a gradient of the same pairs."""
    sample = samples(dropout=True)[number]

    def call(*inputs):
        torch.manual_seed(7)
        return fused_attention(*inputs, **sample.kwargs)

    inputs = (sample.input, *sample.args)
    assert call(*inputs).shape == F.scaled_dot_product_attention(*inputs, **sample.kwargs).shape
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
