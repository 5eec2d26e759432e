"""Documents of whole rows, and the keys that their queries see, by place in the row.

Tensors here are int64 on the CPU: some numbers for each document and each token of this process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Documents of `rows` rows of `total` tokens, in order; all tokens of a row belong to some.

    Of each document, (S,): its row, its tokens [start, end), and the ends of those that are not
    padding, among queries and among keys.
    """

    rows: int
    total: int
    row: Tensor
    start: Tensor
    end: Tensor
    queries: Tensor
    keys: Tensor

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Documents:
        ends = cu_seqlens.cpu().long()
        row, end = torch.zeros(len(ends) - 1, dtype=torch.int64), ends[1:]
        return cls(1, int(ends[-1]), row, ends[:-1], end, end, end)

    @classmethod
    def dense(cls, rows: int, total: int, queries: Tensor | None, keys: Tensor | None) -> Documents:
        """Returns a document for each row. queries, keys: lengths (B,), None for all tokens."""
        row, all_of = torch.arange(rows), torch.full((rows,), total)
        ends = (all_of if x is None else x.cpu().long() for x in (queries, keys))
        return cls(rows, total, row, all_of * 0, all_of, *ends)

    def at(self, place: Tensor) -> Tensor:
        """Returns the document (B, n) of the tokens at `place` (n,) of every row."""
        flat = torch.arange(self.rows)[:, None] * self.total + place
        return torch.searchsorted(self.row * self.total + self.end, flat, right=True)

    def within(self, begin: int, end: int) -> Tensor:
        """Returns the documents that have tokens in [begin, end)."""
        return ((self.end > begin) & (self.start < end) & (self.end > self.start)).nonzero()[:, 0]


class Sides(NamedTuple):
    """The bounds of a query's keys: the sides of a window, -1 for none, and a window of time.

    of_time: nothing, or the first key and one past the last for each token of all rows, (B, total).
    """

    left: int
    right: int
    of_time: tuple[Tensor, ...] = ()

    def is_bounded(self) -> bool:
        """Returns whether a query sees few keys, whatever the length of its document."""
        return self.left >= 0 and self.right >= 0


EVERYTHING = Sides(-1, -1)


class Seen(NamedTuple):
    """The keys [lo, hi) that queries at some places of all rows see, (B, n), and their document.

    Neither end decreases along a row.
    """

    lo: Tensor
    hi: Tensor
    document: Tensor


def seen(documents: Documents, sides: Sides, place: Tensor) -> Seen:
    """Returns the keys that queries at `place` (n,) see; padding sees none."""
    document = documents.at(place)
    start, keys = documents.start[document], documents.keys[document]
    lo = start if sides.left < 0 else torch.maximum(start, place - sides.left)
    hi = keys if sides.right < 0 else torch.minimum(keys, place + sides.right + 1)
    if sides.of_time:
        early, late = sides.of_time
        lo, hi = torch.maximum(lo, early[:, place]), torch.minimum(hi, late[:, place])
    hi = torch.maximum(hi, start)
    lo = torch.minimum(lo, hi).where(place < documents.queries[document], hi)
    return Seen(lo, hi, document)
