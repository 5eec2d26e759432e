"""A column of events in pieces, such as those of several files that are mapped into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Pieces:
    """The items of `parts` one after the other, read as those of an array are: (E,).

    table: what stands for each number in the parts, itself where there is none. touched: is told
    how many bytes each reading has touched, so that mapped pages can be let go of.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        table: np.ndarray | None = None,
        touched: Callable[[int], None] = lambda count: None,
    ):
        self.parts, self.table, self.touched = tuple(parts), table, touched
        self.bounds = np.r_[0, np.cumsum([len(part) for part in parts])].astype(np.int64)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return (self.parts[0] if self.table is None else self.table).dtype

    def __getitem__(self, at: Any) -> Any:
        """Reads a place, a slice, or an array of places, which had better lie close together.

        A slice within one part is a view of it where there is no table.
        """
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"step={step}: expected 1")
            return self._between(start, max(start, stop))
        if np.ndim(at) == 0:
            place = int(at) + (len(self) if at < 0 else 0)
            if not 0 <= place < len(self):
                raise IndexError(f"{at} of {len(self)} events")
            return self._between(place, place + 1)[0]
        places = np.asarray(at)
        if not len(places):
            return self._between(0, 0)
        low = int(places.min())
        return self._between(low, int(places.max()) + 1)[places - low]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def through(self, table: np.ndarray) -> Pieces:
        """The same column by another table: item i is table[self[i]]."""
        return Pieces(self.parts, table if self.table is None else table[self.table], self.touched)

    def _between(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self.bounds[1:-1], start, side="right"))
        last = int(np.searchsorted(self.bounds[1:-1], max(start, stop - 1), side="right"))
        found = [
            self.parts[i][max(0, start - self.bounds[i]) : stop - self.bounds[i]]
            for i in range(first, last + 1)
        ]
        whole = found[0] if len(found) == 1 else np.concatenate(found)
        self.touched(whole.nbytes)
        return whole if self.table is None else self.table[whole]


Column = np.ndarray | Pieces


def bounds_of(column: Column) -> np.ndarray:
    """Places where the parts of a column begin, and the end; an array is a part alone."""
    return column.bounds if isinstance(column, Pieces) else np.array([0, len(column)])


def through(column: Column, table: np.ndarray) -> Column:
    """The numbers of a column by a table."""
    return column.through(table) if isinstance(column, Pieces) else table[column]
