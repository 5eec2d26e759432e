"""The kernels of one loop in Triton's interpreter, with small tiles.

test_triton_one_loop.py runs this file with TRITON_INTERPRET=1.
"""

import warnings
from functools import partial
from itertools import pairwise

import interpreter_bf16
import numpy as np
import pytest
import torch
from support import dtype_id
from torch.nn.functional import pad
from triton.runtime.interpreter import TensorHandle

from clinattn.arguments import Arguments
from clinattn.backends import implementation
from clinattn.kernels import backward, configs, forward
from clinattn.kernels import backward_one_loop as one_loop_back
from clinattn.kernels import forward_one_loop as one_loop

BOUNDS = [{}, {"window_right": 0}, {"window_left": 20, "window_right": 9}]
TILE = configs.TileConfig(32, 16, 4, 2)


@pytest.fixture(autouse=True)
def no_arithmetic_warnings():
    """numpy warns of inf - inf in lanes that a tl.where then discards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def attention_forward(call):
    assert one_loop.why_not(call) is None
    return one_loop.attention_forward_one_loop(call, TILE)


def draw(shape_q, shape_k, dtype=torch.bfloat16):
    return [torch.randn(shape).to(dtype) for shape in (shape_q, shape_k, shape_k)]


ends = partial(torch.tensor, dtype=torch.int32)
CALLS = {
    "one query": lambda d: Arguments(*draw((1, 2, 1, 16), (1, 2, 40, 16), d)),
    "dim 24": lambda d: Arguments(*draw((2, 2, 40, 24), (2, 2, 40, 24), d), scale=0.2),
    "dim 128": lambda d: Arguments(*draw((1, 1, 33, 128), (1, 1, 64, 128), d), scale=0.1),
    "groups": lambda d: Arguments(*draw((2, 4, 33, 16), (2, 2, 47, 16), d), scale=-0.3),
    "causal, more keys": lambda d: Arguments(
        *draw((1, 1, 33, 16), (1, 1, 60, 16), d), window_right=0, bottom_right=True
    ),
    "window": lambda d: Arguments(
        *draw((1, 1, 90, 16), (1, 1, 90, 16), d), window_left=20, window_right=5
    ),
    "queries without keys": lambda d: Arguments(
        *draw((1, 1, 40, 16), (1, 1, 20, 16), d), window_right=0, bottom_right=True
    ),
    "no keys": lambda d: Arguments(*draw((1, 1, 5, 16), (1, 1, 0, 16), d)),
    "lengths": lambda d: Arguments(
        *draw((3, 2, 40, 16), (3, 1, 50, 16), d), q_lengths=ends([40, 0, 7]),
        kv_start=ends([3, 0, 20]), kv_end=ends([50, 9, 20]), window_right=0,
    ),
    "packed": lambda d: Arguments(
        *draw((80, 2, 16), (90, 1, 16), d), cu_seqlens_q=ends([0, 33, 33, 70]),
        cu_seqlens_k=ends([0, 20, 50, 85]), window_left=30, window_right=9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_matches_truth(name, dtype):
    """The reference in fp64, to the rounding of p and of o; lse to that of fp32."""
    call = CALLS[name](dtype)
    q, k, v = (x.double() for x in call[:3])
    reference = implementation("reference", q).forward
    truth, truth_lse, *_ = reference(*call._replace(q=q, k=k, v=v))
    o, lse = attention_forward(call)
    unit = torch.finfo(dtype).eps
    size = v.abs().max().item() if v.numel() else 1.0
    torch.testing.assert_close(o.double(), truth.double(), atol=2 * unit * size, rtol=0)
    torch.testing.assert_close(lse, truth_lse.float(), atol=4e-6, rtol=1e-6)


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


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("n", [64, 75])
def test_shipped_results(bounds, n, monkeypatch):
    """The results of the shipped kernel, whose tiles are wider, to the rounding of p."""
    monkeypatch.setattr(forward, "tile_config", lambda *_: configs.TileConfig(32, 32, 4, 1))
    q, k, v = torch.randn(3, 1, 2, n, 32).bfloat16()
    call = Arguments(q, k, v, scale=0.2, **bounds)
    shipped = forward.attention_forward(call)
    for actual, expected in zip(attention_forward(call), shipped, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("token", [40, 74])
def test_a_nan_reaches_only_what_sees_it(token):
    """Not the queries of tiles that end before it, though its key tile is loaded for them."""
    q, k, v = torch.randn(3, 1, 1, 75, 16).bfloat16()
    k[:, :, token] = v[:, :, token] = torch.nan
    o, _ = attention_forward(Arguments(q, k, v, window_right=3))
    first = (token - 3) // 32 * 32
    assert o[:, :, :first].isfinite().all() and o[:, :, token - 3 :].isnan().all()


BACKWARD = {
    "full": lambda: Arguments(*draw((1, 2, 75, 24), (1, 2, 75, 24)), scale=0.3),
    "causal, more keys": lambda: Arguments(
        *draw((1, 1, 50, 16), (1, 1, 75, 16)), scale=-0.3, window_right=0, bottom_right=True
    ),
    "window": lambda: Arguments(
        *draw((1, 1, 90, 16), (1, 1, 90, 16)), scale=0.3, window_left=20, window_right=5
    ),
    "lengths, queries without keys": lambda: Arguments(
        *draw((2, 1, 50, 16), (2, 1, 40, 16)), scale=0.3, q_lengths=ends([50, 20]),
        kv_end=ends([40, 7]), window_right=0, bottom_right=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_gives_the_shipped_gradients(name, monkeypatch):
    call = BACKWARD[name]()
    for module in (forward, backward):
        monkeypatch.setattr(module, "tile_config", lambda *_: configs.TileConfig(32, 32, 4, 1))
    o, lse = forward.attention_forward(call)
    do = torch.randn_like(o)
    assert one_loop_back.why_not_backward(do, call) is None
    expected = backward.attention_backward(do, None, o, lse, call)[:3]
    sums = one_loop_back.row_sums(do, o, lse, call)
    dq = one_loop_back.dq_one_loop(do, sums, call, TILE)
    dk, dv = one_loop_back.dkdv_one_loop(do, sums, call, configs.TileConfig(16, 32, 4, 2))
    for actual, wanted in zip((dq, dk, dv), expected, strict=True):
        assert actual.isfinite().all()
        size = wanted.abs().max().item()
        torch.testing.assert_close(actual, wanted, atol=2**-6 * size, rtol=2**-6)


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
