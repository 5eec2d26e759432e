"""The one-loop forward in Triton's interpreter, in place of the shipped one wherever it serves.

test_triton_one_loop.py runs this file with TRITON_INTERPRET=1.
"""

import warnings
from itertools import pairwise

import interpreter_bf16
import numpy as np
import pytest
import torch
from cases import CASES
from support import Problem, dtype_id
from torch.nn.functional import pad
from triton.runtime.interpreter import TensorHandle

from clinattn.arguments import Arguments
from clinattn.kernels import backward, configs, forward
from clinattn.kernels import forward_one_loop as one_loop

SHIPPED = forward.attention_forward
PLAIN = [
    case
    for case in CASES
    if case.id
    in (
        "one-query dim24 dim128 gqa scale-negative causal-keys-longer window "
        "lengths-gqa packed-tail"
    ).split()
]
BOUNDS = [{}, {"window_right": 0}, {"window_left": 20, "window_right": 9}]
SERVED = []


def attention_forward(call):
    if one_loop.why_not(call) is not None:
        return SHIPPED(call)
    SERVED.append(call)
    return one_loop.attention_forward_one_loop(call, configs.TileConfig(32, 16, 4, 2))


forward.attention_forward = attention_forward  # before a backend takes it from there


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """The calls that the one-loop forward served, with small tiles."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "tile_config", lambda *_: configs.TileConfig(32, 32, 4, 1))
    SERVED.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of inf - inf in unused lanes
        yield SERVED


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_matches_truth(case, dtype, served):
    problem = Problem(case, dtype)
    problem.check(problem.run("triton"))
    assert served or case.strides == "sliced"


def dot_in_fp64(self, a, b, d, *_):
    """numpy's fp32 product rounds a row by its place in the tile, on some CPUs."""
    product = a.data.astype(np.float64) @ b.data.astype(np.float64)
    return TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_bits_alone_padded_and_packed(bounds, monkeypatch):
    """A sequence gives the same bits alone, padded with NaN on either side, and packed."""
    monkeypatch.setattr(interpreter_bf16, "dot_others", dot_in_fp64)
    lengths, n = (45, 1, 33), 52
    alone = [torch.randn(3, 2, length, 24).bfloat16() for length in lengths]
    expected = [attention_forward(Arguments(*x[:, None], scale=0.2, **bounds)) for x in alone]
    ends = torch.tensor(lengths, dtype=torch.int32)
    right = torch.stack([pad(x, (0, 0, 0, n - x.shape[2]), value=torch.nan) for x in alone], 1)
    o, lse = attention_forward(
        Arguments(*right, scale=0.2, q_lengths=ends, kv_end=ends, **bounds)
    )
    for s, length in enumerate(lengths):
        assert torch.equal(o[s, :, :length], expected[s][0][0])
        assert torch.equal(lse[s, :, :length], expected[s][1][0])
        assert not o[s, :, length:].any() and (lse[s, :, length:] == -torch.inf).all()

    left = torch.stack([pad(x, (0, 0, n - x.shape[2], 0), value=torch.nan) for x in alone], 1)
    left[0].nan_to_num_(0.0)  # queries in the padding do see keys
    o, lse = attention_forward(Arguments(*left, scale=0.2, kv_start=n - ends, **bounds))
    for s, length in enumerate(lengths):
        assert torch.equal(o[s, :, n - length :], expected[s][0][0])
        assert torch.equal(lse[s, :, n - length :], expected[s][1][0])

    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = torch.cat(alone, 2).transpose(1, 2)
    cu_seqlens = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    o, lse = attention_forward(Arguments(*packed, scale=0.2, **cu_seqlens, **bounds))
    for s, (begin, end) in enumerate(pairwise(starts.tolist())):
        assert torch.equal(o[begin:end].transpose(0, 1), expected[s][0][0])
        assert torch.equal(lse[:, begin:end], expected[s][1][0])
    assert len(SERVED) == 3 + len(lengths)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("n", [64, 75])
def test_shipped_results(bounds, n):
    """The results of the shipped kernel, whose tiles are wider, to the rounding of p."""
    q, k, v = torch.randn(3, 1, 2, n, 32).bfloat16()
    call = Arguments(q, k, v, scale=0.2, **bounds)
    for actual, expected in zip(attention_forward(call), SHIPPED(call), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("token", [40, 74])
def test_a_nan_reaches_only_what_sees_it(token):
    """Not the queries of tiles that end before it, though its key tile is loaded for them."""
    q, k, v = torch.randn(3, 1, 1, 75, 16).bfloat16()
    k[:, :, token] = v[:, :, token] = torch.nan
    o, _ = attention_forward(Arguments(q, k, v, window_right=3))
    first = (token - 3) // 32 * 32
    assert o[:, :, :first].isfinite().all() and o[:, :, token - 3 :].isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c._replace(mask=torch.ones(1, 1, 1, 8, dtype=torch.bool)),
        lambda c: c._replace(q=c.q.float(), k=c.k.float(), v=c.v.float()),
        lambda c: c._replace(softcap=3.0),
        lambda c: c._replace(k=torch.randn(1, 1, 9, 17).half()[..., 1:]),
        lambda c: c._replace(q=torch.randn(8 * 16 + 1).half()[1:].view(1, 1, 8, 16)),
    ],
)
def test_says_what_it_does_not_serve(change):
    q, k, v = torch.randn(3, 1, 1, 8, 16).half()
    call = Arguments(q, k, v)
    assert one_loop.why_not(call) is None
    assert one_loop.why_not(change(call))
