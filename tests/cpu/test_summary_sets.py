"""Summaries of attention weights by every instruction set, across its tiles, and their bits."""

import pytest
import torch
from cases import DENSE, FEATURES, PACKED, Case
from instruction_sets import BUILT, SETS
from summaries import REDUCTIONS, SummaryProblem
from summary_bits import assert_equal, check_bits, check_nan, check_unread, draw, every_summary
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


@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"window": (50, 9)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_same_bits_alone_padded_packed_and_over_threads(dtype, keywords, instruction_set, threads):
    members = draw(dtype, (113, 1, 300, 64))
    alone = {}
    for count in (1, 2):
        threads(count)
        alone[count] = [every_summary("cpu", *member, **keywords) for member in members]
    for one, other in zip(*alone.values(), strict=True):
        assert_equal(one, other)
    check_bits(members, alone[1], "cpu", **keywords)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_a_nan_reaches_what_sees_it(dtype, instruction_set):
    check_nan("cpu", dtype, 300)


def test_a_query_of_weight_0_is_not_read(instruction_set):
    check_unread("cpu", 300)


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
