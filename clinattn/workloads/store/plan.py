"""Cuts the events of a folder into pieces, each of whole subjects, by what the scans found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .scan import Scan, Unit, summed

EVENTS = 1 << 22  # of a piece at most, but for a subject who has more: 64 MB of a store


class Piece(NamedTuple):
    """Subjects low : high, both included, with all their events.

    parts: the numbers of the files that have them, each with the row groups to read.
    """

    number: int
    low: int
    high: int
    subjects: int
    events: int
    parts: tuple[tuple[int, tuple[int, ...]], ...]


class FileScan(NamedTuple):
    """A scan of a whole file: as Scan, without codes."""

    subjects: np.ndarray
    events: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


def of_files(units: Sequence[Unit], scans: Sequence[Scan], files: int) -> list[FileScan]:
    """Joins the scans of units to scans of files, in the order of their row groups."""
    found = []
    for number in range(files):
        own = [scan for unit, scan in zip(units, scans, strict=True) if unit.file == number]
        columns = ([getattr(x, name) for x in own] for name in FileScan._fields)
        none = [np.zeros(0, dtype=np.int64)]
        subjects, events, lows, highs = (np.concatenate(x or none) for x in columns)
        found.append(FileScan(*summed(subjects, events), lows, highs))
    return found


def pieces_of(files: Sequence[FileScan], most: int) -> list[Piece]:
    """Cuts files into pieces of at most `most` events, or of one subject.

    Files that share a subject belong together. Small ones, one after the other, are one piece, and
    large ones are cut between subjects, so that any order of processes makes the same pieces.
    """
    pieces: list[Piece] = []
    for group in _groups(files, most):
        subjects, events = summed(
            np.concatenate([files[i].subjects for i in group]),
            np.concatenate([files[i].events for i in group]),
        )
        through = np.cumsum(events)
        first = before = 0
        while first < len(subjects):
            last = max(first + 1, int(np.searchsorted(through, before + most, side="right")))
            low, high = int(subjects[first]), int(subjects[last - 1])
            parts = ((i, _row_groups(files[i], low, high)) for i in group)
            own = tuple((i, row_groups) for i, row_groups in parts if row_groups)
            size = int(through[last - 1]) - before
            pieces.append(Piece(len(pieces), low, high, last - first, size, own))
            first, before = last, int(through[last - 1])
    return pieces


def _row_groups(file: FileScan, low: int, high: int) -> tuple[int, ...]:
    return tuple(np.flatnonzero((file.lows <= high) & (file.highs >= low)).tolist())


def _groups(files: Sequence[FileScan], most: int) -> list[list[int]]:
    """Files that share subjects, and small ones of these one after the other."""
    groups: list[list[int]] = []
    size = most + 1
    for component in _components(files):
        own = int(sum(files[i].events.sum() for i in component))
        if not own:
            continue
        if size + own <= most:
            groups[-1] += component
        else:
            groups.append(component)
            size = 0
        size += own
    return [sorted(group) for group in groups]


def _components(files: Sequence[FileScan]) -> list[list[int]]:
    """Files that share subjects, or share them with files that do, in the order of their first."""
    subjects = np.concatenate([file.subjects for file in files])
    owners = np.repeat(np.arange(len(files)), [len(file.subjects) for file in files])
    order = np.argsort(subjects, kind="stable")
    subjects, owners = subjects[order], owners[order]
    shared = np.flatnonzero(subjects[1:] == subjects[:-1])
    pairs = np.unique(np.c_[owners[shared], owners[shared + 1]], axis=0)
    first = list(range(len(files)))  # a file that each file is with, itself where it is the first

    def found(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for a, b in pairs.tolist():
        a, b = sorted((found(a), found(b)))
        first[b] = a
    components: dict[int, list[int]] = {}
    for i in range(len(files)):
        components.setdefault(found(i), []).append(i)
    return list(components.values())
