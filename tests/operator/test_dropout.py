"""Dropout: its generator, its statistics, and that one batch drops the same pairs in any layout."""

import math

import pytest
import slow_philox
import torch
from support import BACKENDS, dtype_id
from torch.utils.checkpoint import checkpoint

from clinattn import fused_attention, fused_attention_varlen
from clinattn.backends.reference import philox

ALL = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)
# Random123's kat_vectors: rounds, counter, key, output.
KNOWN_ANSWERS = [
    (7, (0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ALL,) * 4, (ALL, ALL), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ALL,) * 4, (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("rounds, counter, key, answer", KNOWN_ANSWERS)
def test_known_answers(rounds, counter, key, answer):
    words = [torch.tensor([x]) for x in (*counter, *key)]
    drawn = philox.philox4x32(tuple(words[:4]), tuple(words[4:]), rounds)
    assert tuple(x.item() for x in drawn) == answer
    assert slow_philox.philox4x32(counter, key, rounds) == answer


@pytest.mark.parametrize("dropout_p", [0.1, 1 / 256, 1e-4, 0.999, 1.0])
def test_keep_mask_is_that_of_plain_integers(dropout_p):
    seed = (1 << 62) - 12345
    b, h, i, j = [3, 70000], 2, range(5, 9), [0, 1, 15, 16, 17, 40, 1000]
    mask = philox.keep_mask(
        torch.tensor([seed]), dropout_p, torch.tensor(b), torch.arange(h), torch.tensor([*i]),
        torch.tensor(j),
    )  # fmt: skip
    assert torch.equal(mask, slow_philox.keep_mask(seed, dropout_p, b, h, i, j))


@pytest.mark.parametrize("dropout_p", [0.5, 0.1, 0.0371, 1e-3, 0.0, 1.0])
def test_fraction(dropout_p):
    """Within 5 standard deviations, also where the probability is no multiple of 1/256."""
    rows = torch.arange(2000)
    mask = philox.keep_mask(
        torch.tensor([99]), dropout_p, torch.zeros(1).long(), torch.zeros(1).long(), rows, rows
    )
    n = mask.numel()
    # The threshold of a row is shared by its pairs: rounding adds its variance once for each row.
    spread = math.sqrt(n * dropout_p * (1 - dropout_p) + 2000 * (2000 / 512) ** 2)
    assert abs((~mask).sum().item() - n * dropout_p) <= 5 * spread + n * 2**-24
    if dropout_p in (0.0, 1.0):
        assert mask.all() == (dropout_p == 0) and mask.any() == (dropout_p == 0)


def dropped(backend, dropout_p, n, heads, call):
    """bool (b, h, n, n): uniform attention over one-hot values shows which pairs are left."""
    torch.manual_seed(7)
    q = torch.zeros(3, heads, n, n)
    return call(q, q, torch.eye(n).expand(3, heads, n, n).contiguous(), dropout_p, backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_same_pairs_dense_padded_and_packed(dtype, backend):
    n, heads, lengths = 37, 2, torch.tensor([37, 20, 5])

    def dense(q, k, v, dropout_p, backend, **keywords):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        return fused_attention(q, k, v, dropout_p=dropout_p, backend=backend, **keywords)

    def padded(*args):
        return dense(*args, q_lengths=lengths, kv_lengths=lengths)

    def packed(q, k, v, dropout_p, backend):
        valid = torch.arange(n) < lengths[:, None]
        q, k, v = (x.transpose(1, 2)[valid].to(dtype) for x in (q, k, v))
        cu_seqlens = torch.tensor([0, *lengths.cumsum(0)]).int()
        o = fused_attention_varlen(q, k, v, cu_seqlens, dropout_p=dropout_p, backend=backend)
        out = torch.zeros(3, n, heads, n, dtype=dtype)
        out[valid] = o
        return out.transpose(1, 2)

    first, second, third = (dropped(backend, 0.3, n, heads, x) for x in (dense, padded, packed))
    assert 0.2 < first.float().mean() < 0.4
    assert torch.equal(second, third)
    for b, length in enumerate(lengths.tolist()):
        rows = slice(0, length)
        assert torch.equal(second[b, :, rows, rows], first[b, :, rows, rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_that_of_the_full_softmax(backend):
    q = torch.randn(2, 2, 33, 16)
    _, lse = fused_attention(q, q, q, dropout_p=0.4, return_lse=True, backend=backend)
    _, expected = fused_attention(q, q, q, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_dropped(backend):
    q, k, v = (torch.randn(2, 2, 33, 16, requires_grad=True) for _ in range(3))
    o = fused_attention(q, k, v, dropout_p=1.0, backend=backend)
    assert (o == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_come_from_torch(backend):
    q = torch.randn(2, 2, 33, 16)
    call = lambda: fused_attention(q, q, q, dropout_p=0.2, backend=backend)
    torch.manual_seed(5)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(call(), first) and torch.equal(call(), second)
    before = torch.get_rng_state()
    fused_attention(q, q, q, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_draw(reentrant, backend):
    q, k, v = (torch.randn(2, 2, 33, 16, requires_grad=True) for _ in range(3))
    call = lambda q, k, v: fused_attention(q, k, v, dropout_p=0.2, backend=backend)
    torch.manual_seed(5)
    expected = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(5)
    o = checkpoint(call, q, k, v, use_reentrant=reentrant)
    o.square().sum().backward()
    assert all(torch.equal(x.grad, g) for x, g in zip((q, k, v), expected, strict=True))
