"""Wrong arguments: what is raised, and what the message names."""

import pytest
import torch

from clinattn import fused_attention, fused_attention_varlen

Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 4, 7, 8)
T = torch.randn(10, 4, 8)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


SELF = {"key": Q, "value": Q}
TIMES = {"times": torch.zeros(2, 5)}

DENSE = [
    # id, changed arguments, error, pattern
    ("list", {"query": [1.0]}, TypeError, "query: got list, expected a torch.Tensor"),
    ("rank", {"query": Q[0, 0, 0]}, ValueError, r"query: got shape \(8,\), expected at"),
    ("key-rank", {"key": K[0, 0, 0]}, ValueError, r"key: got shape \(8,\), expected at least"),
    ("int", {"query": Q.int()}, TypeError, "query: got torch.int32, expected one of .*bfloat16"),
    ("dtypes", {"key": K.half()}, TypeError, "got torch.float32, torch.float16 and torch.float32"),
    ("devices", {"value": K.to("meta")}, ValueError, "got devices cpu, cpu and meta"),
    ("value-shape", {"value": K[:, :, 1:]}, ValueError, "value: got shape .*expected that of key"),
    ("batch", {"query": Q.repeat(2, 1, 1, 1)}, ValueError, r"key: .* broadcasts: \(2,\) to \(4"),
    ("head-dim", {"query": Q[..., 1:]}, ValueError, "key: got head_dim 8, .*query, 7"),
    (
        "head-dim-0",
        {n: x[..., :0] for n, x in (("query", Q), ("key", K), ("value", K))},
        ValueError,
        "query: got head_dim 0, expected at least 1",
    ),
    (
        "head-dim-0-of-keys",
        {"query": Q[..., :0], "key": K[..., :0]},
        ValueError,
        "query: got head_dim 0, expected at least 1",
    ),
    ("head-dim-0-of-values", {"value": K[..., :0]}, ValueError, "value: got .* at least 1"),
    (
        "heads",
        {"key": K[:, :2], "value": K[:, :2]},
        ValueError,
        "key: got 2 heads, expected the 4 of query; enable_gqa=True",
    ),
    (
        "gqa-heads",
        {"key": K[:, :3], "value": K[:, :3], "enable_gqa": True},
        ValueError,
        "key: got 3 heads, expected a divisor of the 4 heads",
    ),
    (
        "gqa-no-heads",
        {"key": K[:, :0], "value": K[:, :0], "enable_gqa": True},
        ValueError,
        "key: got 0 heads",
    ),
    ("dropout-negative", {"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1, expected a prob"),
    ("dropout-large", {"dropout_p": 1.5}, ValueError, "dropout_p: got 1.5"),
    ("dropout-nan", {"dropout_p": float("nan")}, ValueError, "dropout_p: got nan"),
    ("dropout-tensor", {"dropout_p": torch.ones(1)}, TypeError, "dropout_p: got Tensor, expected"),
    (
        "dropout-gradient",
        {"dropout_p": torch.ones((), requires_grad=True)},
        TypeError,
        "dropout_p: got a tensor that requires a gradient, expected",
    ),
    ("softcap-0", {"softcap": 0.0}, ValueError, "softcap: got 0.0, expected a number > 0, or None"),
    ("softcap-infinite", {"softcap": float("inf")}, ValueError, "softcap: got inf"),
    ("softcap-str", {"softcap": "30"}, TypeError, "softcap: got str, expected a float or None"),
    ("prefix-negative", {"global_prefix": -1}, ValueError, "global_prefix: got -1, expected >= 0"),
    ("prefix-long", {"global_prefix": 8}, ValueError, "global_prefix: got 8, .* most the 7 keys"),
    ("prefix-float", {"global_prefix": 1.5}, TypeError, "global_prefix: got float, expected an"),
    ("alibi-list", {"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes: got list"),
    ("alibi-int", {"alibi_slopes": ints(1, 1, 1, 1)}, TypeError, "alibi_slopes: got torch.int32"),
    (
        "alibi-shape",
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        r"alibi_slopes: got shape \(3,\), expected \(4,\) or \(2, 4\)",
    ),
    ("alibi-device", {"alibi_slopes": torch.ones(4).to("meta")}, ValueError, "alibi_slopes: got d"),
    (
        "relative-heads",
        {"relative_bias": torch.ones(3, 5)},
        ValueError,
        r"relative_bias: got shape \(3, 5\), expected \(4, 5\)",
    ),
    (
        "relative-even",
        {"relative_bias": torch.ones(4, 6)},
        ValueError,
        r"relative_bias: got shape \(4, 6\), expected \(heads, 2 L \+ 1\)",
    ),
    ("relative-list", {"relative_bias": [[1.0]]}, TypeError, "relative_bias: got list"),
    (
        "segments-cross",
        {"segment_ids": torch.zeros(2, 5).int()},
        ValueError,
        "segment_ids: got 5 queries and 7 keys, expected as many of one as of the other",
    ),
    ("times-cross", {**TIMES, "time_window": 1}, ValueError, "times: got 5 queries and 7 keys"),
    ("times-alone", {**SELF, **TIMES}, ValueError, "times: got times alone, expected time_window"),
    ("window-alone", {"time_window": 24.0}, ValueError, "time_window: got a value without times"),
    ("decay-alone", {"time_decay": torch.ones(4)}, ValueError, "time_decay: got a value without"),
    (
        "time-window-negative",
        {**SELF, **TIMES, "time_window": -0.5},
        ValueError,
        "time_window: got -0.5, expected >= 0, in the unit of times",
    ),
    ("time-window-nan", {**SELF, **TIMES, "time_window": float("nan")}, ValueError, "got nan"),
    (
        "time-window-tensor",
        {**SELF, **TIMES, "time_window": torch.ones(4)},
        TypeError,
        "time_window: got Tensor, expected a float",
    ),
    (
        "time-decay-shape",
        {**SELF, **TIMES, "time_decay": torch.ones(2, 4)},
        ValueError,
        r"time_decay: got shape \(2, 4\), expected \(4,\)",
    ),
    (
        "times-half",
        {**SELF, "times": torch.zeros(2, 5).half(), "time_window": 1},
        TypeError,
        "times: got torch.float16, expected one of torch.float32, torch.float64, torch.int64",
    ),
    (
        "times-shape",
        {**SELF, "times": torch.zeros(5), "time_window": 1},
        ValueError,
        r"times: got shape \(5,\), expected \(2, 5\)",
    ),
    (
        "times-grad",
        {**SELF, "times": torch.zeros(2, 5, requires_grad=True), "time_window": 1},
        NotImplementedError,
        "times: has no gradient",
    ),
    (
        "segments-float",
        {**SELF, "segment_ids": torch.zeros(2, 5)},
        TypeError,
        "segment_ids: got torch.float32, expected torch.int32 or int64",
    ),
    (
        "segments-shape",
        {**SELF, "segment_ids": ints(0, 0)},
        ValueError,
        r"segment_ids: got shape \(2,\), expected \(2, 5\)",
    ),
    ("window", {"window": -1}, ValueError, "window: got -1, expected sides >= 0"),
    ("window-side", {"window": (3, -2)}, ValueError, r"window: got \(3, -2\)"),
    ("window-float", {"window": 2.5}, TypeError, "window: got 2.5, expected an int or"),
    ("window-bool", {"window": True}, TypeError, "window: got True"),
    ("window-three", {"window": (1, 2, 3)}, TypeError, r"window: got \(1, 2, 3\)"),
    ("scale", {"scale": "0.5"}, TypeError, "scale: got str, expected a float"),
    ("backend", {"backend": "gpu"}, ValueError, "backend: got 'gpu', expected None or one of tri"),
    ("mask-list", {"attn_mask": [[True]]}, TypeError, "attn_mask: got list"),
    ("mask-int", {"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask: got torch.int32"),
    (
        "mask-shape",
        {"attn_mask": torch.ones(5, 6).bool()},
        ValueError,
        r"attn_mask: got shape \(5, 6\), expected one that broadcasts to \(2, 4, 5, 7\)",
    ),
    ("mask-rank", {"attn_mask": torch.ones(1, 2, 4, 5, 7)}, ValueError, "attn_mask: got shape"),
    ("mask-device", {"attn_mask": torch.ones(5, 7, device="meta")}, ValueError, "attn_mask: got d"),
    ("kv-lengths-list", {"kv_lengths": [7, 7]}, TypeError, "kv_lengths: got list"),
    ("kv-lengths-float", {"kv_lengths": torch.ones(2)}, TypeError, "kv_lengths: got torch.float32"),
    ("kv-lengths-shape", {"kv_lengths": ints(7)}, ValueError, r"got shape \(1,\), expected \(2,\)"),
    ("kv-lengths-large", {"kv_lengths": ints(3, 8)}, ValueError, "from 3 to 8, expected 0 to 7"),
    ("kv-lengths-negative", {"kv_lengths": ints(-1, 7)}, ValueError, "from -1 to 7"),
    ("kv-lengths-device", {"kv_lengths": ints(1, 2).to("meta")}, ValueError, "kv_lengths: got dev"),
    ("q-lengths", {"q_lengths": ints(3, 6)}, ValueError, "q_lengths: .* expected 0 to 5"),
]

PACKED = [
    ("rank", {"query": Q}, ValueError, r"query: got shape.*expected 3: \(total_tokens, heads"),
    ("key-rank", {"key": K, "value": K}, ValueError, "key: got shape"),
    ("heads", {"key": T[:, :2], "value": T[:, :2]}, ValueError, "key: got 2 heads"),
    ("list", {"cu_seqlens_q": [0, 10]}, TypeError, "cu_seqlens_q: got list"),
    ("int64", {"cu_seqlens_q": ints(0, 10, dtype=torch.int64)}, TypeError, "got torch.int64"),
    ("device", {"cu_seqlens_q": ints(0, 10).to("meta")}, ValueError, "cu_seqlens_q: got device me"),
    ("2d", {"cu_seqlens_q": ints(0, 10)[None]}, ValueError, r"cu_seqlens_q: got shape \(1, 2\)"),
    ("empty", {"cu_seqlens_q": ints()}, ValueError, r"cu_seqlens_q: got shape \(0,\)"),
    ("start", {"cu_seqlens_q": ints(1, 10)}, ValueError, "got a first value of 1, expected 0"),
    ("decrease", {"cu_seqlens_q": ints(0, 6, 4, 10)}, ValueError, "got 6 followed by 4"),
    ("overrun", {"cu_seqlens_q": ints(0, 11)}, ValueError, "last value of 11, .* at most 10 tok"),
    ("k-overrun", {"cu_seqlens_k": ints(0, 6, 12)}, ValueError, "cu_seqlens_k: .* 12"),
    (
        "count",
        {"cu_seqlens_k": ints(0, 10)},
        ValueError,
        "cu_seqlens_k: got 1 sequences.* the 2 of",
    ),
    ("max-q", {"max_seqlen_q": 5}, ValueError, "max_seqlen_q: got 5, expected at least .*, 6"),
    ("max-k", {"max_seqlen_k": 0}, ValueError, "max_seqlen_k: got 0"),
    ("dropout", {"dropout_p": 1.1}, ValueError, "dropout_p: got 1.1"),
    ("prefix", {"global_prefix": -1}, ValueError, "global_prefix: got -1"),
    (
        "times-shape",
        {"times": torch.zeros(2, 5), "time_window": 1.0},
        ValueError,
        r"times: got shape \(2, 5\), expected \(10,\)",
    ),
    (
        "times-cross",
        {"times": torch.zeros(10), "time_window": 1.0, "cu_seqlens_k": ints(0, 5, 10)},
        ValueError,
        "times: got 10 queries and 10 keys in other sequences",
    ),
    ("times-alone", {"times": torch.zeros(10)}, ValueError, "times: got times alone"),
    ("alibi", {"alibi_slopes": torch.ones(3, 4)}, ValueError, r"expected \(4,\) or \(2, 4\)"),
    ("window", {"window": -1}, ValueError, "window: got -1"),
    ("backend", {"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
]


def table(rows):
    return pytest.mark.parametrize(
        "changed, error, match", [pytest.param(*row[1:], id=row[0]) for row in rows]
    )


@table(DENSE)
def test_dense(changed, error, match):
    arguments = {"query": Q, "key": K, "value": K, **changed}
    with pytest.raises(error, match=match):
        fused_attention(**arguments)


@table(PACKED)
def test_packed(changed, error, match):
    arguments = {"query": T, "key": T, "value": T, "cu_seqlens_q": ints(0, 6, 10), **changed}
    with pytest.raises(error, match=match):
        fused_attention_varlen(**arguments)


def test_nothing_is_computed_before_the_checks(monkeypatch):
    import clinattn.operator.ops as module

    def refuse(*args):
        raise AssertionError("computed")

    monkeypatch.setattr(module, "forward", refuse)
    with pytest.raises(AssertionError, match="computed"):
        fused_attention(Q, K, K, return_lse=True)
    for _, changed, error, match in DENSE:
        with pytest.raises(error, match=match):
            fused_attention(**{"query": Q, "key": K, "value": K, **changed})


def test_neutral_values_are_not_refused():
    o = fused_attention(Q, K, K, dropout_p=0, softcap=None, global_prefix=0, window=(None, None))
    assert torch.equal(o, fused_attention(Q, K, K))


def test_mask_and_causal_together():
    mask = torch.rand(5, 7) < 0.5
    both = fused_attention(Q, K, K, mask, is_causal=True)
    assert torch.equal(both, fused_attention(Q, K, K, mask & torch.ones(5, 7).tril().bool()))
