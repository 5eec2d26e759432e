"""All summaries of a few sequences, on any backend: alone, padded and packed; beside NaN.

members = draw(torch.bfloat16, lengths=(75, 1, 33))
check_bits(members, [every_summary(backend, *x) for x in members], backend)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from summaries import REDUCTIONS, SUMS
from torch import Tensor

from clinattn import attention_summary

RESULTS = (*REDUCTIONS, "places")


def every_summary(
    backend: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, weights: Tensor, **keywords: Any
) -> list[Tensor]:
    """RESULTS of queries (B, H, N, D), or packed ones."""
    found: list[Tensor] = []
    for reduce in REDUCTIONS:
        given = weights if reduce in SUMS else None
        one = attention_summary(
            q, k, v, do, weights=given, reduce=reduce, backend=backend, **keywords
        )
        found += one if reduce == "topk" else [one]
    return found


def draw(
    dtype: torch.dtype, lengths: Sequence[int], heads: int = 4, dim: int = 40
) -> list[list[Tensor]]:
    """Returns q, k, v, do (1, H, n, D) and weights (1, H, n) for each length."""
    return [
        [
            *(torch.randn(1, heads, n, dim).to(dtype) for _ in range(4)),
            torch.rand(1, heads, n),
        ]
        for n in lengths
    ]


def check_bits(
    members: list[list[Tensor]], alone: list[list[Tensor]], backend: str, **keywords: Any
) -> None:
    """Packing, right padding by lengths and left padding by a mask change no bit of `alone`."""
    lengths = [member[0].shape[2] for member in members]
    *packed, weights = (torch.cat([m[i][0] for m in members], 1) for i in range(5))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    results = every_summary(
        backend, *(x.transpose(0, 1) for x in packed), weights, cu_seqlens_q=cu_seqlens, **keywords
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
    results = every_summary(backend, *right, q_lengths=ends, kv_lengths=ends, **keywords)
    for s, (length, expected) in enumerate(zip(lengths, alone, strict=True)):
        assert_equal([x[s, :, :length] for x in results], [x[0] for x in expected])

    for member, expected in zip(members, alone, strict=True):
        before = n - member[0].shape[2]
        q, k, v, do, weights = (
            padded(x, before, 0, 0 if i == 4 else torch.nan) for i, x in enumerate(member)
        )
        mask = (torch.arange(n) >= before)[None, None, None]
        keywords |= {"attn_mask": mask, "backend": backend}
        for reduce in REDUCTIONS:
            if reduce in SUMS:  # queries of weight 0 may be NaN
                found = attention_summary(q, k, v, do, weights=weights, reduce=reduce, **keywords)
            else:
                found = attention_summary(q.nan_to_num(), k, reduce=reduce, **keywords)
            if reduce == "topk":
                found = (found[0], torch.where(found[1] < 0, found[1], found[1] - before))
            of_one = expected[RESULTS.index(reduce) :][: 2 if reduce == "topk" else 1]
            actual = found if reduce == "topk" else [found]
            assert_equal([x[:, :, before:] for x in actual], of_one)


def padded(x: Tensor, before: int, after: int, fill: float) -> Tensor:
    """Returns x (1, H, N, ...) with rows of `fill` around its tokens."""
    rows = x.new_full((*x.shape[:2], before + after, *x.shape[3:]), fill)
    return torch.cat([rows[:, :, :before], x, rows[:, :, before:]], 2)


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ"


def check_nan(backend: str, dtype: torch.dtype, n: int) -> None:
    """A NaN in a query reaches the keys that it sees, and its own numbers."""
    at = n // 3
    q, k, v, do = torch.randn(4, 1, 1, n, 40).to(dtype)
    q[0, 0, at] = torch.nan
    keywords = {"window": (9, 4)}
    with_nan = every_summary(backend, q, k, v, do, torch.ones(n), **keywords)
    without = every_summary(backend, q.nan_to_num(), k, v, do, torch.ones(n), **keywords)
    for name, a, b in zip(RESULTS, with_nan, without, strict=True):
        touched = torch.arange(n) == at
        if name in SUMS:
            touched[at - 9 : at + 5] = True
        assert torch.equal(a[0, 0, ~touched], b[0, 0, ~touched]), name
        if name == "places":
            assert (a[0, 0, touched] == -1).all()
        else:
            assert a[0, 0, touched].isnan().all(), name


def check_unread(backend: str, n: int) -> None:
    """Neither a query of weight 0 is read nor its row of a mask, nor what they would give: infinite
    scores are NaN less infinity.
    """
    at = n // 3
    q, k, v, do = torch.randn(4, 1, 1, n, 40)
    weights = torch.ones(n)
    weights[at] = 0
    mask = torch.randn(n, n)
    expected = every_summary(backend, q, k, v, do, weights, attn_mask=mask)
    mask[at] = torch.inf
    q[0, 0, at] = do[0, 0, at] = torch.nan
    for reduce, one in zip(SUMS, expected, strict=False):
        actual = attention_summary(
            q, k, v, do, weights=weights, reduce=reduce, attn_mask=mask, backend=backend
        )
        assert torch.equal(actual, one), reduce
    lse = torch.zeros(1, 1, n)
    of_none = attention_summary(
        q, k, lse=lse, weights=weights * 0, attn_mask=mask, backend=backend
    )
    assert of_none.eq(0).all()
