"""xformers' biases of keys with gaps and in pages against what their documentation says."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from compared import Explicit
from xformers_calls import BOTTOM_RIGHT, attend, check, draw, heads_first, qkv, sees

from clinattn.integrations import xformers as xf
from clinattn.integrations.xformers.attn_bias import (
    VARLEN_BIASES,
    _PaddedSeqLenInfo,
    _SeqLenInfo,
)

QUERIES, KEYS = [2, 1, 0, 3, 5], [5, 7, 2, 4, 3]
FULL = {}
CAUSAL = {"right": 0, **BOTTOM_RIGHT}
LOCAL = {"left": 2, "right": 1, **BOTTOM_RIGHT}
CAUSAL_LOCAL = {"left": 2, "right": 0, **BOTTOM_RIGHT}


def following(starts):
    """Returns the places of each block's keys, from where it starts."""
    return [list(range(start, start + n)) for start, n in zip(starts, KEYS, strict=True)]


PADDING = 8
PADDED = following(range(0, 40, PADDING))
# In no order, with a gap at either end; the last two blocks have keys in common.
STARTS = [20, 3, 0, 31, 33]
GAPPY, GAPPY_END = following(STARTS), 38

# Of 12 pages, 2 for each sequence; what is not needed leads nowhere.
PAGE = 4
TABLE = torch.tensor([[9, 2], [0, 7], [11, -1], [3, 500], [5, 10]], dtype=torch.int32)
SKIPPED = [1, 0, 3, 2, 5]


def in_pages(starts):
    spans = zip(TABLE.tolist(), starts, KEYS, strict=True)
    return [
        [row[j // PAGE] * PAGE + j % PAGE for j in range(start, start + n)]
        for row, start, n in spans
    ]


FULL_TABLE = torch.tensor([[9, 2], [0, 7], [11, 1], [3, 8], [5, 10]], dtype=torch.int32)


def padded(cls, *window):
    return cls.from_seqlens(QUERIES, PADDING, KEYS), PADDED, 40


def padded_local(cls, *window):
    return cls.from_seqlens_local(QUERIES, PADDING, KEYS, *window), PADDED, 40


def gappy(cls):
    return cls.from_seqlens(QUERIES, [*STARTS, GAPPY_END], KEYS), GAPPY, GAPPY_END


def gappy_local(cls, *window):
    bias = cls.from_seqlens_local_gappy(QUERIES, [*STARTS, GAPPY_END], KEYS, *window)
    return bias, GAPPY, GAPPY_END


def paged(cls):
    return cls.from_seqlens(QUERIES, KEYS, TABLE, PAGE), in_pages([0] * 5), 12 * PAGE


def paged_local(cls, window):
    bias = cls.from_seqlens_local(QUERIES, KEYS, TABLE, PAGE, window)
    return bias, in_pages([0] * 5), 12 * PAGE


def paged_gappy(cls):
    table = FULL_TABLE  # with what is skipped, every sequence but one needs both pages
    bias = cls.from_seqlens(QUERIES, SKIPPED, KEYS, table, PAGE)
    rows = zip(table.tolist(), SKIPPED, KEYS, strict=True)
    places = [
        [row[j // PAGE] * PAGE + j % PAGE for j in range(start, start + n)]
        for row, start, n in rows
    ]
    return bias, places, 12 * PAGE


CASES = {
    "padded": (padded(xf.BlockDiagonalPaddedKeysMask), FULL),
    "padded, causal": (padded(xf.BlockDiagonalCausalWithOffsetPaddedKeysMask), CAUSAL),
    "padded, local": (padded_local(xf.BlockDiagonalLocalAttentionPaddedKeysMask, 2, 1), LOCAL),
    "padded, causal local": (
        padded_local(xf.BlockDiagonalCausalLocalAttentionPaddedKeysMask, 3),
        CAUSAL_LOCAL,
    ),
    "gappy": (gappy(xf.BlockDiagonalGappyKeysMask), FULL),
    "gappy, causal": (gappy(xf.BlockDiagonalCausalWithOffsetGappyKeysMask), CAUSAL),
    "gappy, local": (
        gappy_local(xf.BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask, 2, 1),
        LOCAL,
    ),
    "paged": (paged(xf.PagedBlockDiagonalPaddedKeysMask), FULL),
    "paged, causal": (paged(xf.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask), CAUSAL),
    "paged, causal local": (
        paged_local(xf.PagedBlockDiagonalCausalLocalPaddedKeysMask, 3),
        CAUSAL_LOCAL,
    ),
    "paged, gappy": (paged_gappy(xf.PagedBlockDiagonalGappyKeysMask), FULL),
    "paged, gappy, causal": (
        paged_gappy(xf.PagedBlockDiagonalCausalWithOffsetGappyKeysMask),
        CAUSAL,
    ),
}


def seen(places, n_keys, band):
    """Returns bool (queries, n_keys)."""
    visible = torch.zeros(sum(QUERIES), n_keys, dtype=torch.bool)
    row = 0
    for n, keys in zip(QUERIES, places, strict=True):
        visible[row : row + n, keys] = sees(n, len(keys), **band)
        row += n
    return visible


@pytest.mark.parametrize("case, band", CASES.values(), ids=list(CASES))
def test_keys_apart(case, band):
    """NaN in keys that do not count reaches neither results nor gradients."""
    bias, places, n_keys = case
    clean = qkv(1, sum(QUERIES), n_keys, 3)
    counts = torch.zeros(n_keys, dtype=torch.bool)
    counts[sum(places, [])] = True
    dirty = [torch.where(counts[:, None, None], x, torch.nan).detach() for x in clean[1:]]
    q, k, v = clean[0], *(x.requires_grad_() for x in dirty)
    problem = Explicit(*heads_first(*clean), seen(places, n_keys, band))
    check(problem, *attend(q, k, v, bias), q=q, k=k, v=v)
    again = bias.to("cpu")
    assert type(again) is type(bias)
    assert torch.equal(attend(q, k, v, again)[0], attend(q, k, v, bias)[0])


@pytest.mark.parametrize("case, band", CASES.values(), ids=list(CASES))
def test_materialize(case, band):
    """In pages it is asked for in rows of the table, and has the pages that the table leads to."""
    bias, places, n_keys = case
    is_paged = hasattr(bias, "block_tables")
    if is_paged:
        used = {key for keys in places for key in keys}
        bias = bias.to("cpu")
        bias.block_tables = FULL_TABLE
        assert max(used) < n_keys
    asked = FULL_TABLE.numel() * PAGE if is_paged else n_keys
    dense = bias.materialize((2, 3, sum(QUERIES), asked), torch.bfloat16)
    assert dense.dtype == torch.bfloat16
    expected = torch.where(seen(places, n_keys, band), 0.0, -torch.inf).bfloat16()
    assert torch.equal(dense, expected.expand(2, 3, -1, -1))
    with pytest.raises(ValueError, match="shape: got"):
        bias.materialize((sum(QUERIES), asked + 1))


def test_a_page_twice_counts_twice():
    """Two places in the row of one sequence are two keys, also where they are the same."""
    table = torch.tensor([[1, 1]], dtype=torch.int32)
    bias = xf.PagedBlockDiagonalPaddedKeysMask.from_seqlens([3], [7], table, PAGE)
    q, k, v = qkv(1, 3, 2 * PAGE, 2)
    dense = bias.materialize((1, 2, 3, 2 * PAGE))
    torch.testing.assert_close(
        xf.memory_efficient_attention(q, k, v, bias), xf.memory_efficient_attention(q, k, v, dense)
    )
    assert dense[0, 0, 0].exp().round().tolist() == [0, 0, 0, 0, 2, 2, 2, 1]


def test_groups_share_pages():
    bias, places, n_keys = CASES["paged, gappy, causal"][0]
    q = draw(1, sum(QUERIES), 2, 3, 24).requires_grad_()
    k, v = (draw(1, n_keys, 2, 1, 24, seed=at).requires_grad_() for at in (1, 2))
    problem = Explicit(
        *heads_first(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]), seen(places, n_keys, CAUSAL)
    )
    out, lse = attend(q, *(x.expand(-1, -1, -1, 3, -1) for x in (k, v)), bias)
    check(problem, out, lse, flat=lambda x: x.flatten(2, 3), q=q, k=k, v=v)


# ---- from one bias to another


def same(bias, other, n_keys):
    q, k, v = qkv(1, sum(QUERIES), n_keys, 3)
    attended = (xf.memory_efficient_attention(q, k, v, x) for x in (bias, other))
    return type(bias) is type(other) and torch.equal(*attended)


def test_windows_of_padded_keys():
    bias, places, n_keys = CASES["padded, local"][0]
    made = CASES["padded"][0][0].make_local_attention(2, 1)
    assert same(made, bias, n_keys)
    assert same(CASES["padded, causal"][0][0].make_local_attention(2, 1), bias, n_keys)


PAGED = {
    "padded": ("padded", "paged"),
    "padded, causal": ("padded, causal", "paged, causal"),
    "the class of pages says what is causal": ("padded", "paged, causal"),
    "padded, local": ("padded, causal local", "paged, causal local"),
}


@pytest.mark.parametrize("whole, in_parts", PAGED.values(), ids=list(PAGED))
def test_padded_keys_become_pages(whole, in_parts):
    bias, expected = CASES[whole][0][0], CASES[in_parts][0][0]
    made = bias.make_paged(TABLE, PAGE, type(expected))
    assert same(made, expected, 12 * PAGE)
    assert made.k_seqinfo.padding == 2 * PAGE and made.k_seqinfo.seqlen is bias.k_seqinfo.seqlen


@pytest.mark.parametrize("causal", ["", ", causal"])
def test_keys_with_gaps_become_pages(causal):
    """Block i has the keys from i * notional_padding on."""
    starts = [i * PADDING + skipped for i, skipped in enumerate(SKIPPED)]
    expected = CASES[f"paged, gappy{causal}"][0][0]
    bias = type(CASES[f"gappy{causal}"][0][0]).from_seqlens(QUERIES, [*starts, 40], KEYS)
    assert same(bias.make_paged(FULL_TABLE, PAGE, PADDING, type(expected)), expected, 12 * PAGE)


# ---- lengths that change in place


def test_lengths_in_place():
    """The objects stay, and so does max_seqlen."""
    bias = xf.BlockDiagonalCausalMask.from_seqlens([5, 2, 3])
    info = bias.q_seqinfo
    kept = info.seqstart, info.seqstart_py
    info.from_seqlens_inplace([1, 4, 5])
    assert (info.seqstart, info.seqstart_py) == kept and info.max_seqlen == 5
    assert info.seqstart.tolist() == info.seqstart_py == [0, 1, 5, 10]
    q, k, v = qkv(1, 10, 10, 3)
    fresh = xf.BlockDiagonalCausalMask.from_seqlens([1, 4, 5])
    attended = (xf.memory_efficient_attention(q, k, v, x) for x in (bias, fresh))
    assert torch.equal(*attended)


def test_padded_lengths_in_place():
    bias = xf.BlockDiagonalPaddedKeysMask.from_seqlens(QUERIES, PADDING, [7, 3, 1, 2, 6])
    made = bias.make_paged(TABLE, PAGE, xf.PagedBlockDiagonalPaddedKeysMask)
    bias.k_seqinfo.from_seqlens_padded_inplace(KEYS)
    assert bias.k_seqinfo.seqlen.tolist() == bias.k_seqinfo.seqlen_py == KEYS
    assert same(bias, CASES["padded"][0][0], 40) and same(made, CASES["paged"][0][0], 12 * PAGE)


# ---- xformers' own objects


def test_objects_of_xformers_itself():
    """Known by the names of class and fields."""
    for case, _ in CASES.values():
        bias, _, n_keys = case
        theirs = type(type(bias).__name__, (SimpleNamespace,), {})(**vars(bias))
        q, k, v = qkv(1, sum(QUERIES), n_keys, 3)
        attended = (xf.memory_efficient_attention(q, k, v, x) for x in (bias, theirs))
        assert torch.equal(*attended)


def test_biases_of_many_sequences():
    assert all(isinstance(case[0], VARLEN_BIASES) for case, _ in CASES.values())


# ---- what is refused


@dataclass
class PagedOtherMask(xf.PagedBlockDiagonalPaddedKeysMask):
    pass


def attending(bias, n_keys):
    q, k = torch.randn(1, sum(QUERIES), 2, 8), torch.randn(1, n_keys, 2, 8)
    return xf.memory_efficient_attention(q, k, k, bias)


def changed(name, **fields):
    bias = CASES[name][0][0].to("cpu")
    vars(bias).update(fields)
    return bias


PADS = CASES["padded"][0][0]
GAPS = CASES["gappy"][0][0]
Pages = xf.PagedBlockDiagonalPaddedKeysMask
GappyPages = xf.PagedBlockDiagonalGappyKeysMask
LocalPages = xf.PagedBlockDiagonalCausalLocalPaddedKeysMask
WRONG = {
    "keys": (lambda: attending(PADS, 41), ValueError, "key: got 41 tokens, expected the 40"),
    "keys of pages": (
        lambda: attending(CASES["paged"][0][0], 47),
        ValueError,
        "key: got 47 tokens, expected pages of 4",
    ),
    "pages that are not there": (
        lambda: attending(CASES["paged"][0][0], 44),
        ValueError,
        "block_tables: got pages from 0 to 11, expected 0 to 10",
    ),
    "a page below 0": (
        lambda: attending(changed("paged", block_tables=TABLE - 1), 48),
        ValueError,
        "block_tables: got pages from -1",
    ),
    "a table of floats": (
        lambda: attending(changed("paged", block_tables=TABLE.float()), 48),
        TypeError,
        "block_tables: got torch.float32",
    ),
    "a table of fewer rows": (
        lambda: attending(changed("paged", block_tables=TABLE[:4]), 48),
        ValueError,
        r"block_tables: got shape \(4, 2\), expected \(5, pages\)",
    ),
    "a table of fewer pages": (
        lambda: attending(changed("paged", block_tables=TABLE[:, :1]), 48),
        ValueError,
        "got a block of the keys 0 to 5, expected 0 to 4",
    ),
    "page size": (
        lambda: Pages.from_seqlens(QUERIES, KEYS, TABLE, 0),
        ValueError,
        "page_size: got 0",
    ),
    "more keys than pages": (
        lambda: Pages.from_seqlens(QUERIES, [9, 1, 1, 1, 1], TABLE, PAGE),
        ValueError,
        "seqlens: got 9, expected at most the padding, 8",
    ),
    "more keys than pages, gappy": (
        lambda: GappyPages.from_seqlens(QUERIES, [4] * 5, [5] * 5, TABLE, PAGE),
        ValueError,
        "block_tables: got room for 8 keys of a sequence, expected 9",
    ),
    "more keys than pages, made": (
        lambda: PADS.make_paged(TABLE, 3, Pages),
        ValueError,
        "got room for 6 keys of a sequence, expected 7",
    ),
    "starts": (
        lambda: xf.BlockDiagonalGappyKeysMask.from_seqlens([1, 2], [0, 3], [3, 1]),
        ValueError,
        "seqstarts: got 2, expected 3",
    ),
    "an end": (
        lambda: xf.BlockDiagonalGappyKeysMask.from_seqlens([1, 2], [0, 3, 5], [3, 4]),
        ValueError,
        "seqlens: got a block up to 7, expected up to 5",
    ),
    "a block past the end": (
        lambda: attending(
            changed("gappy", k_seqinfo=replace(GAPS.k_seqinfo, seqstart_py=[9] * 6)), 9
        ),
        ValueError,
        "got a block of the keys 9 to 14, expected 0 to 9",
    ),
    "a window that pages have not": (
        lambda: CASES["padded, local"][0][0].make_paged(TABLE, PAGE, Pages),
        TypeError,
        "paged_type: got PagedBlockDiagonalPaddedKeysMask",
    ),
    "a causal window that pages have not": (
        lambda: CASES["padded, causal local"][0][0].make_paged(TABLE, PAGE, Pages),
        TypeError,
        "expected PagedBlockDiagonalCausalLocalPaddedKeysMask",
    ),
    "a window from nowhere": (
        lambda: PADS.make_paged(TABLE, PAGE, LocalPages),
        TypeError,
        "window",
    ),
    "pages of another kind": (
        lambda: PADS.make_paged(TABLE, PAGE, GappyPages),
        TypeError,
        "paged_type: got PagedBlockDiagonalGappyKeysMask",
    ),
    "pages of a class of one's own": (
        lambda: PADS.make_paged(TABLE, PAGE, PagedOtherMask),
        TypeError,
        "paged_type: got PagedOtherMask",
    ),
    "gaps of another padding": (
        lambda: GAPS.make_paged(TABLE, PAGE, 8, GappyPages),
        ValueError,
        "notional_padding: got 8, but a block starts 16 keys before its own",
    ),
    "gaps of no whole page": (
        lambda: GAPS.make_paged(TABLE, PAGE, 7, GappyPages),
        ValueError,
        "notional_padding: got 7, expected a multiple of 4",
    ),
    "window": (lambda: PADS.make_local_attention(-1, 2), ValueError, "window_left: got -1"),
    "window size": (
        lambda: LocalPages.from_seqlens_local(QUERIES, KEYS, TABLE, PAGE, 0),
        ValueError,
        "window_size: got 0",
    ),
    "a window of xformers' own object": (
        lambda: attending(changed("padded, causal local", _window_size=0), 40),
        ValueError,
        "window: got",
    ),
    "longer in place": (
        lambda: _SeqLenInfo.from_seqlens([2, 3]).from_seqlens_inplace([1, 4]),
        ValueError,
        "seqlens: got 4, expected at most max_seqlen, 3",
    ),
    "more in place": (
        lambda: _SeqLenInfo.from_seqlens([2, 3]).from_seqlens_inplace([1, 1, 1]),
        ValueError,
        "seqlens: got 3, expected the 2",
    ),
    "padded in place": (
        lambda: _PaddedSeqLenInfo.from_seqlens_padded([2, 3], 4).from_seqlens_inplace([1, 2]),
        TypeError,
        "from_seqlens_padded_inplace",
    ),
    "gappy in place": (
        lambda: GAPS.k_seqinfo.from_seqlens_inplace([1, 2, 3, 4, 5]),
        NotImplementedError,
        "from_seqlens_gappy",
    ),
    "batch": (
        lambda: xf.memory_efficient_attention(
            *(torch.randn(2, n, 2, 8) for n in (sum(QUERIES), 40, 40)), PADS
        ),
        ValueError,
        "query: got batch size 2",
    ),
}


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=list(WRONG))
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
