"""Scores of tokens, summed over what they belong to: words, codes, visits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def words_of(encoding: Any) -> Tensor:
    """Returns the word of each token, (B, N) int64, -1 for special tokens and padding.

    encoding: what a fast tokenizer of transformers returns for one text or several, or a list of
    encodings of the package tokenizers, all of one length. The result is a `by` of attribute.
    """
    if callable(getattr(encoding, "word_ids", None)):
        ids = encoding["input_ids"]
        alone = len(ids) > 0 and isinstance(ids[0], int)  # one text, without return_tensors
        rows = [encoding.word_ids(i) for i in range(1 if alone else len(ids))]
    elif isinstance(encoding, Sequence) and all(hasattr(x, "word_ids") for x in encoding):
        rows = [x.word_ids for x in encoding]
    else:
        raise TypeError(
            f"encoding: got {type(encoding).__name__}, expected what a fast tokenizer returns"
        )
    if len({len(row) for row in rows}) > 1:
        raise ValueError("encoding: got rows of several lengths, expected padding=True")
    return _numbers("encoding", rows)


def summed(scores: Tensor, by: Any, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the sum of scores in each group of each sequence, (sequences, groups).

    scores: (B, N), or (T,) with cu_seqlens. by: integers of the same shape, or lists of ints and
    None; a token with None or a negative number is left out. groups is the largest number plus 1.
    """
    if not isinstance(by, Tensor):
        if not isinstance(by, Sequence) or isinstance(by, str):
            raise TypeError(f"by: got {type(by).__name__}, expected a tensor of integers or lists")
        nested = len(by) > 0 and not (by[0] is None or isinstance(by[0], int))
        rows = list(by) if nested else [by]
        by = _numbers("by", rows if scores.dim() == 2 else [[x for row in rows for x in row]])
        by = by if scores.dim() == 2 else by[0]
    if by.is_floating_point() or by.dtype == torch.bool:
        raise TypeError(f"by: got {by.dtype}, expected integers")
    if by.shape != scores.shape:
        raise ValueError(
            f"by: got shape {tuple(by.shape)}, expected that of the tokens, {tuple(scores.shape)}"
        )
    by = by.to(scores.device).long()
    if scores.dim() == 2:
        of = torch.arange(len(scores), device=scores.device)[:, None].expand_as(by)
        sequences = len(scores)
    else:
        assert cu_seqlens is not None
        places = torch.arange(len(scores), device=scores.device)
        of = torch.bucketize(places, cu_seqlens[1:].long().to(scores.device), right=True)
        sequences = len(cu_seqlens) - 1
    groups = int(by.max()) + 1 if by.numel() and int(by.max()) >= 0 else 0
    kept = (by >= 0) & (of < sequences)
    sums = scores.new_zeros(sequences * groups)
    return sums.index_add(0, (of * groups + by)[kept], scores[kept]).view(sequences, groups)


def _numbers(name: str, rows: Sequence[Sequence[int | None]]) -> Tensor:
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name}: got rows of several lengths, expected that of the tokens")
    numbers = [[-1 if x is None else x for x in row] for row in rows]
    return torch.tensor(numbers, dtype=torch.int64).view(len(rows), -1)
