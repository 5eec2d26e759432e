"""Padding, unpadding and batching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinattn.operator.packing import (
    batch_by_tokens,
    cu_seqlens_from_lengths,
    cu_seqlens_from_mask,
    mask_from_lengths,
    pad,
    unpad,
)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cu_seqlens(dtype):
    lengths = torch.tensor([3, 0, 5], dtype=dtype)
    expected = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    assert torch.equal(cu_seqlens_from_lengths(lengths), expected)
    mask = mask_from_lengths(lengths, 6)
    assert cu_seqlens_from_lengths(lengths).dtype == torch.int32
    for given_mask in (mask, mask.long(), mask.flip(1)):
        assert torch.equal(cu_seqlens_from_mask(given_mask), expected)
    assert torch.equal(cu_seqlens_from_lengths(lengths[:0]), expected[:1])


@pytest.mark.parametrize("lengths", [[3, 0, 5], [5, 5, 5], [0, 0], [], [1]], ids=str)
@pytest.mark.parametrize("tail", [(), (2,), (2, 3)], ids=str)
def test_pad_is_the_inverse_of_unpad(lengths, tail):
    lengths = torch.tensor(lengths, dtype=torch.long)
    padded = torch.randn(len(lengths), 5, *tail)
    packed = unpad(padded, lengths=lengths)
    expected = [row[:n] for row, n in zip(padded, lengths.tolist(), strict=True)]
    assert torch.equal(packed.values, torch.cat([padded.new_empty(0, *tail), *expected]))
    assert packed.max_seqlen == max(lengths.tolist(), default=0)
    assert torch.equal(packed.cu_seqlens, cu_seqlens_from_lengths(lengths))
    back = pad(packed.values, packed.indices, len(lengths), 5)
    keep = mask_from_lengths(lengths, 5).view(len(lengths), 5, *(1,) * len(tail))
    assert torch.equal(back, torch.where(keep, padded, 0))


def test_any_mask():
    padded, mask = torch.randn(3, 40, 2), torch.rand(3, 40) < 0.4
    packed = unpad(padded, mask=mask)
    assert torch.equal(packed.values, padded[mask])
    assert torch.equal(packed.values, padded.flatten(0, 1)[packed.indices])
    assert packed.max_seqlen == mask.sum(1).max()
    assert torch.equal(unpad(padded, mask=mask.long()).values, packed.values)


def test_padding_may_hold_anything():
    padded = torch.randn(2, 4).masked_fill(~mask_from_lengths(torch.tensor([1, 4]), 4), torch.nan)
    packed = unpad(padded, torch.tensor([1, 4]))
    assert pad(packed.values, packed.indices, 2, 4).isfinite().all()


def test_gradients():
    lengths = torch.tensor([3, 0, 5])

    def there_and_back(padded):
        packed = unpad(padded, lengths)
        return pad(packed.values.square(), packed.indices, 3, 5)

    padded = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(there_and_back, padded)


def test_wrong_arguments():
    padded = torch.randn(2, 4)
    with pytest.raises(ValueError, match="exactly one of lengths and mask"):
        unpad(padded)
    with pytest.raises(ValueError, match=r"lengths: got shape \(3,\), expected \(2,\)"):
        unpad(padded, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"lengths: got values up to 5, expected at most 4"):
        unpad(padded, torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 5\), expected \(2, 4\)"):
        unpad(padded, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="got 9 at position 1, expected at most 8"):
        batch_by_tokens([3, 9], 8)


def test_batches():
    lengths = [5, 1, 9, 3, 3, 0, 8]
    assert batch_by_tokens(lengths, 10) == [[2], [6], [0, 3], [4, 1, 5]]
    assert batch_by_tokens(lengths, 10, padded=True) == [[2], [6], [0, 3], [4, 1, 5]]
    assert batch_by_tokens([4, 2, 2, 2], 8) == [[0, 1, 2], [3]]
    assert batch_by_tokens([4, 2, 2, 2], 8, padded=True) == [[0, 1], [2, 3]]
    assert batch_by_tokens([], 10) == []


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50), max_size=40), st.integers(50, 120), st.booleans())
def test_every_sequence_is_in_one_batch_within_the_budget(lengths, budget, padded):
    batches = batch_by_tokens(lengths, budget, padded=padded)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        members = [lengths[i] for i in batch]
        assert (len(members) * max(members) if padded else sum(members)) <= budget
    assert batches == batch_by_tokens(lengths, budget, padded=padded)
