"""Keys that no query sees may hold anything, wherever in a block of the kernels they begin."""

import pytest
import torch
from instruction_sets import BUILT, SETS, forced
from support import dtype_id

import clinattn

pytestmark = BUILT


def results(inputs, do, **keywords):
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    o, lse = clinattn.fused_attention(q, k, v, return_lse=True, backend="cpu", **keywords)
    return o, lse, *torch.autograd.grad((o, lse), (q, k, v), (do, lse.detach()))


@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("instruction_set", SETS)
def test_they_reach_nothing(instruction_set, dtype, n_queries, bottom_right):
    """n_queries: 1 sees all of its keys; of 3 each sees others, and some keys only some see."""
    n_keys = 100
    q, do = torch.randn(2, 1, 2, n_queries, 40).to(dtype)
    k, v = torch.randn(2, 1, 2, n_keys, 40).to(dtype)
    with forced(instruction_set):
        for reach in range(n_keys - n_queries):
            kept = slice(-reach - n_queries, None) if bottom_right else slice(reach + n_queries)
            keywords = {"window": reach, "bottom_right": bottom_right}
            found = []
            for fill in (0.0, float("nan"), float("inf")):
                filled = [torch.full_like(x, fill) for x in (k, v)]
                for x, y in zip(filled, (k, v), strict=True):
                    x[..., kept, :] = y[..., kept, :]
                found.append(results((q, *filled), do, **keywords))
            for name, expected, *others in zip(("o", "lse", "dq", "dk", "dv"), *found, strict=True):
                for x in others:  # parts of fp32 are summed in another order beside what has none
                    units = (x - expected).abs().max() / expected.abs().max().clamp(min=1)
                    assert units <= 4 * torch.finfo(x.dtype).eps, (reach, name, units)
