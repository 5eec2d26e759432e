"""Refusals of xformers' biases of keys with gaps and in pages: the error, and what it names."""

from dataclasses import dataclass, replace

import pytest
import torch
from xformers_keys import CASES, KEYS, PAGE, QUERIES, TABLE

from clinattn.integrations import xformers as xf
from clinattn.integrations.xformers.attn_bias import (
    _PaddedSeqLenInfo,
    _SeqLenInfo,
)


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
