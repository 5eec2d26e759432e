"""xformers' biases of keys with gaps and in pages against what their documentation says."""

from types import SimpleNamespace

import pytest
import torch
from compared import Explicit
from xformers_calls import attend, check, draw, heads_first, qkv, sees
from xformers_keys import CASES, CAUSAL, FULL_TABLE, KEYS, PADDING, PAGE, QUERIES, SKIPPED, TABLE

from clinattn.integrations import xformers as xf
from clinattn.integrations.xformers.attn_bias import (
    VARLEN_BIASES,
)


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
