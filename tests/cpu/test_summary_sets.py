"""Summaries of attention weights by every instruction set, across its tiles, and their bits."""

import pytest
import torch
from cases import DENSE, FEATURES, PACKED, Case
from instruction_sets import BUILT, SETS
from summaries import REDUCTIONS, SUMS, SummaryProblem
from support import dtype_id

from clinattn import attention_summary

pytestmark = BUILT

# The best set is what tests/operator/test_summary.py runs.
SHORT = [x for x in (*DENSE, *PACKED, *FEATURES) if x.work < 1e5 and x.dropout is None]
LONG = [
    Case("long", nq=400, nk=350, dim=72, heads=2, kv_heads=1),
    Case("long-window", batch=1, nq=900, dim=40, window=(100, 33)),
    Case("long-left", batch=2, nq=700, dim=32, mask="left:b11k"),
    Case("long-mask", batch=2, nq=300, nk=515, dim=24, mask="bool:b1qk"),
    Case("long-128", batch=1, nq=600, dim=128, causal=True),
    Case("long-values", batch=1, nq=300, dim=64, value_dim=200),
    Case("long-packed", nq=(300, 1, 0, 500, 33), dim=64, heads=4, kv_heads=2, causal=True),
    Case("long-prefix-left", batch=2, nq=700, dim=24, mask="left:b11k", window=20, global_prefix=3),
    Case("long-biases", batch=1, nq=600, dim=24, alibi="h", relative=300, softcap=4.0, causal=True),
    Case("long-1e4", batch=1, nq=300, nk=600, dim=64, logits=1e4),
    Case("ends", nq=tuple(range(1, 70)), dim=24, heads=2, kv_heads=1),
    Case("ends-window", nq=tuple(range(1, 131, 6)), dim=33, window=(9, 4)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problems():
    """Yields (case, dtype, set): 16-bit types where a set has products of its own for them."""
    for name in SETS or [None]:
        own = {"amx": DTYPES, "avx512_bf16": DTYPES[1:2]}.get(name, DTYPES[:1])
        for case in (*SHORT, *LONG) if name not in SETS[-1:] else LONG:
            yield from ((case, dtype, name) for dtype in own)


@pytest.mark.parametrize(
    ("case", "dtype", "instruction_set"),
    list(problems()),
    indirect=["instruction_set"],
    ids=lambda x: dtype_id(x) if isinstance(x, torch.dtype) else str(x),
)
def test_matches_the_matrix(case, dtype, instruction_set):
    problem = SummaryProblem(case, dtype)
    for reduce in REDUCTIONS:
        problem.check(reduce, problem.summary(reduce, "cpu"))


def every_summary(q, k, v, do, weights, **keywords):
    """All reductions of queries (B, H, N, D), or packed ones, as one list of tensors."""
    found = []
    for reduce in REDUCTIONS:
        given = weights if reduce in SUMS else None
        one = attention_summary(
            q, k, v, do, weights=given, reduce=reduce, backend="cpu", **keywords
        )  # fmt: skip
        found += one if reduce == "topk" else [one]
    return found


@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"window": (50, 9)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_same_bits_alone_padded_packed_and_over_threads(dtype, keywords, instruction_set, threads):
    lengths = [113, 1, 300, 64]
    members = [
        [*(torch.randn(1, 4, n, 40).to(dtype) for _ in range(4)), torch.rand(1, 4, n)]
        for n in lengths
    ]
    threads(1)
    alone = [every_summary(*member, **keywords) for member in members]
    threads(2)
    for member, expected in zip(members, alone, strict=True):
        assert_equal(every_summary(*member, **keywords), expected)

    *packed, weights = (torch.cat([m[i][0] for m in members], 1) for i in range(5))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    results = every_summary(
        *(x.transpose(0, 1) for x in packed), weights, cu_seqlens_q=cu_seqlens, **keywords
    )
    for s, expected in enumerate(alone):
        rows = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        assert_equal([x[:, rows] for x in results], [x[0] for x in expected])

    n = max(lengths) + 7
    right = [
        torch.cat([padded(m[i], 0, n - m[i].shape[2], torch.nan) for m in members])
        for i in range(5)
    ]
    ends = torch.tensor(lengths)
    results = every_summary(*right, q_lengths=ends, kv_lengths=ends, **keywords)
    for s, (length, expected) in enumerate(zip(lengths, alone, strict=True)):
        assert_equal([x[s, :, :length] for x in results], [x[0] for x in expected])

    for member, expected in zip(members, alone, strict=True):
        before = n - member[0].shape[2]
        q, k, v, do, weights = (
            padded(x, before, 0, 0 if i == 4 else torch.nan) for i, x in enumerate(member)
        )
        mask = (torch.arange(n) >= before)[None, None, None]
        for reduce, one in zip((*REDUCTIONS, "places"), expected, strict=True):
            if reduce in SUMS:  # queries of weight 0 may be NaN
                actual = attention_summary(
                    q, k, v, do, weights=weights, reduce=reduce, attn_mask=mask, **keywords
                )  # fmt: skip
                assert_equal([actual[:, :, before:]], [one])
                continue
            actual = attention_summary(
                q.nan_to_num(), k, reduce=reduce.replace("places", "topk"), attn_mask=mask,
                **keywords,
            )  # fmt: skip
            if reduce in ("topk", "places"):
                actual = actual[reduce == "places"]
            if reduce == "places":
                actual = torch.where(actual < 0, actual, actual - before)
            assert_equal([actual[:, :, before:]], [one])


def padded(x, before, after, fill):
    """x (1, H, N, ...) with rows of `fill` around its tokens."""
    rows = x.new_full((*x.shape[:2], before + after, *x.shape[3:]), fill)
    return torch.cat([rows[:, :, :before], x, rows[:, :, before:]], 2)


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_a_nan_reaches_what_sees_it(dtype, instruction_set):
    q, k, v, do = torch.randn(4, 1, 1, 300, 40).to(dtype)
    q[0, 0, 100] = torch.nan  # sees keys 91 to 104
    with_nan = every_summary(q, k, v, do, torch.ones(300), window=(9, 4))
    without = every_summary(q.nan_to_num(), k, v, do, torch.ones(300), window=(9, 4))
    for name, a, b in zip((*REDUCTIONS, "places"), with_nan, without, strict=True):
        touched = torch.zeros(300, dtype=torch.bool)
        touched[91:105 if name in SUMS else 92] = True
        if name not in SUMS:
            touched = torch.arange(300) == 100
        assert torch.equal(a[0, 0, ~touched], b[0, 0, ~touched]), name
        if name == "places":
            assert (a[0, 0, touched] == -1).all()
        else:
            assert a[0, 0, touched].isnan().all(), name


def test_a_query_of_weight_0_is_not_read(instruction_set):
    """Nor are its row of a mask and what it would give: infinite scores are NaN less infinity."""
    q, k, v, do = torch.randn(4, 1, 1, 300, 40)
    weights = torch.ones(300)
    weights[100] = 0
    mask = torch.randn(300, 300)
    expected = every_summary(q, k, v, do, weights, attn_mask=mask)
    mask[100] = torch.inf
    q[0, 0, 100] = do[0, 0, 100] = torch.nan
    lse = torch.zeros(1, 1, 300)
    for reduce, one in zip(SUMS, expected, strict=False):
        actual = attention_summary(
            q, k, v, do, weights=weights, reduce=reduce, attn_mask=mask, backend="cpu"
        )  # fmt: skip
        assert torch.equal(actual, one), reduce
    assert attention_summary(q, k, lse=lse, weights=weights * 0, attn_mask=mask).eq(0).all()


ORDERS = {
    "rising": lambda n: torch.arange(n),
    "falling": lambda n: -torch.arange(n),
    "two values": lambda n: torch.arange(n) % 7 // 6,
    "twice each": lambda n: torch.randperm(n) // 2,
    "one high": lambda n: 90 * (torch.arange(n) == n - 5),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_largest_of_keys_in_any_order(order, instruction_set):
    """Scores are exact, and far enough apart for weights to differ; the window cuts tiles."""
    queries, keys = 130, 523
    scores = (ORDERS[order](keys) / 8).clamp(-30, 90)
    q, k = torch.zeros(1, 1, queries, 16), torch.zeros(1, 1, keys, 16)
    q[..., 0], k[..., 0] = 1, scores
    for top in (1, 8, 16):
        for keywords, reach in (({}, keys), ({"window": (keys, 200)}, 200)):
            values, places = attention_summary(
                q, k, reduce="topk", k=top, scale=1.0, backend="cpu", **keywords
            )  # fmt: skip
            for row in (0, 64, queries - 1):
                seen = scores[: min(keys, row + reach + 1)].double()
                p = seen.softmax(0)
                order_of = p.float().sort(descending=True, stable=True)
                # four units of the normaliser are as many of a weight, times its size
                rtol = 4 * torch.finfo(torch.float32).eps * (1 + float(scores.abs().max()))
                expected = p[order_of.indices[:top]]
                torch.testing.assert_close(
                    values[0, 0, row].double(), expected, rtol=rtol, atol=0
                )
                assert torch.equal(places[0, 0, row], order_of.indices[:top])
