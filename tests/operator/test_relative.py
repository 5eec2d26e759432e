"""T5's relative position buckets as a table of distances."""

import math

import pytest
import torch
from support import KERNELS, dtype_id

from clinattn import fused_attention, fused_attention_varlen, t5_relative_bias
from clinattn.operator.relative import t5_buckets

SETTINGS = [(32, True, 128), (32, False, 128), (16, True, 40), (8, False, 20), (64, True, 300)]


def bucket(distance, num_buckets, bidirectional, max_distance):
    """The paper's definition for one distance j - i."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if distance > 0 else 0
        away = abs(distance)
    else:
        away = max(-distance, 0)
    exact = num_buckets // 2
    if away < exact:
        return offset + away
    log = math.log(away / exact) / math.log(max_distance / exact)
    return offset + min(exact + int(log * (num_buckets - exact) + 1e-6), num_buckets - 1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_buckets_are_those_of_the_definition(settings):
    far = settings[2]
    expected = [bucket(x, *settings) for x in range(-far, far + 1)]
    assert t5_buckets(*settings).tolist() == expected
    assert bucket(10 * far, *settings) == expected[-1]
    assert bucket(-10 * far, *settings) == expected[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_buckets_are_those_of_transformers(settings):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    num_buckets, bidirectional, max_distance = settings
    distance = torch.arange(-4 * max_distance, 4 * max_distance + 1)
    theirs = t5.T5Attention._relative_position_bucket(
        distance, bidirectional, num_buckets, max_distance
    )
    ours = t5_buckets(*settings)
    assert torch.equal(ours[distance.clamp(-max_distance, max_distance) + max_distance], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_is_the_bias_of_t5(dtype):
    q, k, v = (torch.randn(2, 3, 300, 16, dtype=dtype) for _ in range(3))
    weight = torch.randn(32, 3, dtype=dtype, requires_grad=True)
    table = t5_relative_bias(weight)
    assert table.shape == (3, 257)
    o = fused_attention(q, k, v, relative_bias=table, scale=1.0, backend="reference")
    place = torch.arange(300)
    buckets = t5_buckets(32, True, 128)[(place - place[:, None]).clamp(-128, 128) + 128]
    bias = weight[buckets].permute(2, 0, 1)[None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    torch.testing.assert_close(o, expected)
    do = torch.randn_like(o)
    grads = [torch.autograd.grad(x, weight, do)[0] for x in (o, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_table_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"weight: got shape \(32,\), expected \(num_buckets, h"):
        t5_relative_bias(torch.randn(32))


@pytest.mark.parametrize("backend", KERNELS)
def test_far_reach_over_short_sequences_takes_few_copies_of_the_table(backend):
    """Sequences have sums of their own for the distances that they have, and for no others."""
    near, far, heads, n = 15, 4096, 2, 16
    torch.manual_seed(0)
    q, k, v, do = torch.randn(4, 200 * n, heads, 8)
    cu_seqlens = torch.arange(0, 200 * n + 1, n, dtype=torch.int32)
    table = torch.randn(heads, 2 * near + 1)

    def gradient(reach):
        pad = (reach - near, reach - near)
        padded = torch.nn.functional.pad(table, pad).requires_grad_()
        o = fused_attention_varlen(
            *(q, k, v, cu_seqlens), relative_bias=padded, max_seqlen_q=n, backend=backend
        )
        return torch.autograd.grad(o, padded, do)[0]

    expected = torch.nn.functional.pad(gradient(near), (far - near, far - near))
    with torch.profiler.profile(profile_memory=True) as profile:
        actual = gradient(far)
    assert torch.equal(actual, expected)
    largest = max(x.cpu_memory_usage for x in profile.events())  # of the whole backward pass
    assert largest <= 8 * expected.numel() * torch.float64.itemsize
