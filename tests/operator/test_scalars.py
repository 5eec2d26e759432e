"""Numbers in other clothes than int, float and bool: the same results, or a clear refusal."""

import math

import numpy as np
import pytest
import torch
from public_calls import ENDS, PACKED, D, Q, T

from clinattn import fused_attention, fused_attention_varlen, rotary
from clinattn.encoder import EncoderConfig
from clinattn.integrations import flash_attn as fa

SAME = [
    ({"window": [3, 2]}, {"window": (3, 2)}),
    ({"window": np.array([3, 2])}, {"window": (3, 2)}),
    ({"window": torch.tensor([3, 2])}, {"window": (3, 2)}),
    ({"window": (np.int32(3), None)}, {"window": (3, None)}),
    ({"window": np.int64(1)}, {"window": 1}),
    ({"window": torch.tensor(1)}, {"window": 1}),
    ({"window": 2**63}, {}),
    ({"window": (2**70, 2**31)}, {}),
    ({"window": (2**70, 1)}, {"window": (None, 1)}),
    ({"global_prefix": np.uint8(2), "window": 1}, {"global_prefix": 2, "window": 1}),
    ({"scale": np.float32(0.25)}, {"scale": 0.25}),
    ({"scale": np.array(0.25)}, {"scale": 0.25}),
    ({"scale": torch.tensor(0.25)}, {"scale": 0.25}),
    ({"scale": 2}, {"scale": 2.0}),
    ({"softcap": np.float64(3.0)}, {"softcap": 3.0}),
    ({"is_causal": np.bool_(True)}, {"is_causal": True}),
    ({"is_causal": 1}, {"is_causal": True}),
    ({"is_causal": torch.tensor(True)}, {"is_causal": True}),
]


@pytest.mark.parametrize("given, plain", SAME, ids=lambda x: ",".join(map(str, x.items())))
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_they_mean_the_same(given, plain, packed):
    function, inputs = (
        (fused_attention_varlen, (T, T, T, ENDS)) if packed else (fused_attention, (Q, Q, Q))
    )
    assert torch.equal(function(*inputs, **given), function(*inputs, **plain))


REFUSED = [
    ({"scale": 1e39}, ValueError, r"scale: got 1e\+39, expected a number from -2.359e\+38 to"),
    ({"scale": 3e38}, ValueError, "scale: got 3e"),
    ({"scale": math.nan}, ValueError, "scale: got nan"),
    ({"scale": -math.inf}, ValueError, "scale: got -inf"),
    ({"scale": 10**400}, ValueError, "scale: got an int beyond floats"),
    ({"scale": np.complex64(1)}, TypeError, "scale: got complex, expected a float"),
    (
        {"scale": torch.tensor(0.5, requires_grad=True)},
        TypeError,
        "scale: got a tensor that requires a gradient, expected a float",
    ),
    ({"scale": torch.tensor([0.5])}, TypeError, "scale: got Tensor, expected a float"),
    ({"softcap": 1e39}, ValueError, r"softcap: got 1e\+39, expected .* to 3.403e\+38"),
    ({"softcap": 1e-46}, ValueError, "softcap: got 1e-46"),
    ({"dropout_p": True}, TypeError, "dropout_p: got bool"),
    ({"is_causal": "yes"}, TypeError, "is_causal: got str, expected a bool"),
    ({"is_causal": None}, TypeError, "is_causal: got NoneType"),
    ({"bottom_right": 2}, TypeError, "bottom_right: got int"),
    ({"window": np.bool_(True)}, TypeError, "window: got"),
    ({"window": torch.tensor([1, 2, 3])}, TypeError, "window: got"),
    ({"window": "12"}, TypeError, "window: got '12'"),
    ({"window": -(2**70)}, ValueError, "window: got -1180591620717411303424"),
    ({"global_prefix": np.float32(1)}, TypeError, "global_prefix: got float32"),
    ({"query": Q.to_sparse()}, TypeError, "query: got a tensor of layout torch.sparse_coo"),
    (
        {"key": torch.nested.nested_tensor([Q[0], Q[1]])},
        TypeError,
        "key: got a nested tensor, expected a dense one; fused_attention takes jagged",
    ),
]


@pytest.mark.parametrize("words, error, match", REFUSED, ids=[x[2] for x in REFUSED])
def test_what_is_no_number_is_refused(words, error, match):
    with pytest.raises(error, match=match):
        fused_attention(**{"query": Q, "key": Q, "value": Q} | words)


def test_a_scale_that_fp64_holds_is_taken():
    q = Q.double() * 1e-20
    assert fused_attention(q, q, q, scale=1e39).isfinite().all()
    with pytest.raises(ValueError, match="scale: got 1.7e"):
        fused_attention(q, q, q, scale=1.7e308)


@pytest.mark.parametrize("most", [np.int32(6), torch.tensor(6), 2**63, 2**70], ids=str)
def test_bounds_of_lengths(most):
    words = {"cu_seqlens_q": ENDS, "max_seqlen_q": most, "max_seqlen_k": most}
    expected = fused_attention_varlen(T, T, T, ENDS)
    assert torch.equal(fused_attention_varlen(T, T, T, **words), expected)


@pytest.mark.parametrize("most", [11.0, "6", True, -1, -(2**70)])
def test_no_bounds_of_lengths(most):
    with pytest.raises((TypeError, ValueError), match="max_seqlen_q: got"):
        fused_attention_varlen(T, T, T, ENDS, max_seqlen_q=most)


@pytest.mark.parametrize(
    "window",
    [
        (np.int64(2), np.int32(1)),
        [2, 1],
        np.array([2, 1]),
        torch.tensor([2, 1]),
        (torch.tensor(2), torch.tensor(1)),
        torch.Size((2, 1)),
    ],
    ids=["numpy", "list", "array", "tensor", "tensors", "size"],
)
def test_flash_attn_windows(window):
    expected = fa.flash_attn_func(D, D, D, window_size=(2, 1))
    assert torch.equal(fa.flash_attn_func(D, D, D, window_size=window), expected)
    packed = fa.flash_attn_varlen_func(T, T, T, *PACKED.values(), window_size=(2, 1))
    other = fa.flash_attn_varlen_func(T, T, T, *PACKED.values(), window_size=window)
    assert torch.equal(other, packed)


def test_fields_of_an_encoder():
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": np.int64(20), "max_positions": 32, "windows": [np.int32(4)]}
    config = EncoderConfig(**sizes)
    assert type(config.vocab_size) is int and config.windows == (4,)
    for field in ("num_layers", "norm_eps", "causal"):
        with pytest.raises(TypeError, match=f"{field}: got str, expected"):
            EncoderConfig(**sizes | {field: "2"})


# Times of 64 bits

FAR_APART = [
    [-(2**63), -(2**63) + 1, -5, 7, 2**63 - 2, 2**63 - 1],
    [-(2**62) - 1, -(2**62), 0, 1, 2**62, 2**62 + 5],
    [0, 1, 2**53, 2**53 + 1, 2**62, 2**63 - 1],
]


@pytest.mark.parametrize("times", FAR_APART, ids=["all", "beyond a half", "a half"])
def test_times_that_span_all_of_int64(times):
    """Windows as of exact differences from the first time, rounded once to fp32."""
    q = torch.randn(1, 2, 6, 8)
    since = [float(np.float32(float(t - times[0]))) for t in times]
    for window in (0.0, 1.0, 2.0**61, 2.0**63, 2.0**64):
        near = [[abs(np.float32(a - b)) <= np.float32(window) for b in since] for a in since]
        expected = fused_attention(q, q, q, torch.tensor(near), backend="reference")
        o = fused_attention(q, q, q, times=torch.tensor([times]), time_window=window)
        torch.testing.assert_close(o, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("times", FAR_APART, ids=["all", "beyond a half", "a half"])
def test_rotary_turns_by_exact_differences(times):
    q = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    first = times[0] if abs(times[0]) >= 2**20 else 0
    since = torch.tensor([[float(t - first) for t in times]], dtype=torch.float64)
    ours, expected = rotary(q, q, torch.tensor([times]))[0], rotary(q, q, since)[0]
    assert torch.equal(ours, expected)


def test_disorder_of_far_times_is_named():
    q = torch.randn(1, 2, 2, 8)
    with pytest.raises(ValueError, match="times: row 0 decreases at 1, from 9223372036854775807"):
        fused_attention(
            q, q, q, times=torch.tensor([[2**63 - 1, -(2**63)]]), time_window=1.0
        )
