"""The first pass: which subjects and codes row groups have, and how many events of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..meds_events import EventFile
from .batches import read_batch, write_batch
from .inputs import Input, require_same

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa

ROWS = 1 << 23  # of a unit, so that one file with many row groups is the work of many processes


class Unit(NamedTuple):
    """Row groups first : last of file number `file`."""

    file: int
    first: int
    last: int


class Scan(NamedTuple):
    """Subjects (S,) ascending with their events (S,), codes (C,) with theirs (C,).

    lows, highs (G,): the least and greatest subject of each row group.
    """

    subjects: np.ndarray
    events: np.ndarray
    codes: list[str]
    counts: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


def units_of(files: Sequence[Input], most: int = ROWS) -> list[Unit]:
    """Cuts files into units of at most `most` rows, or of one row group."""
    units = []
    for number, file in enumerate(files):
        first = rows = 0
        for group, own in enumerate(file.rows or ()):
            if rows and rows + own > most:
                units.append(Unit(number, first, group))
                first, rows = group, 0
            rows += own
        if file.rows:
            units.append(Unit(number, first, len(file.rows)))
    return units


def scan_file(folder: Path, unit: Unit) -> Path:
    """The place of a scan in the folder of work."""
    return folder / f"scan-{unit.file:05d}-{unit.first:05d}-{unit.last:05d}.arrow"


def make_scan(root: Path, file: Input, unit: Unit, path: Path) -> None:
    """Scans a unit, and writes the scan whole or not at all."""
    import pyarrow as pa

    require_same(root, file)
    found = scanned(root, root / file.name, range(unit.first, unit.last))
    require_same(root, file)
    lists = {
        name: pa.array([value], pa.list_(pa.string() if name == "codes" else pa.int64()))
        for name, value in found._asdict().items()
    }
    write_batch(path, lists)


def read_scan(path: Path) -> Scan:
    """Reads what make_scan wrote. Raises OSError or pyarrow's errors."""
    batch = read_batch(path)
    lists = {name: batch[name].flatten() for name in Scan._fields}
    numbers = {name: found.to_numpy() for name, found in lists.items() if name != "codes"}
    return Scan(codes=lists["codes"].to_pylist(), **numbers)


def scanned(root: Path, path: Path, groups: Sequence[int]) -> Scan:
    """Reads row groups of a file."""
    codes: Counter[str] = Counter()
    subjects, events, lows, highs = [], [], [0] * len(groups), [-1] * len(groups)
    with EventFile(root, path) as file:
        for i, group in enumerate(groups):
            own = []
            names, counts = None, np.zeros(0, dtype=np.int64)
            for batch in file.batches([group]):
                if batch.names is not names:
                    _add(codes, names, counts)
                    names, counts = batch.names, np.zeros(len(batch.names), dtype=np.int64)
                counts += np.bincount(batch.codes, minlength=len(counts))
                own.append(runs(batch.subjects))
            _add(codes, names, counts)
            if own:
                found, sums = summed(*map(np.concatenate, zip(*own, strict=True)))
                lows[i], highs[i] = found[0], found[-1]
                subjects.append(found)
                events.append(sums)
    none = [np.zeros(0, dtype=np.int64)]
    found, sums = summed(np.concatenate(subjects or none), np.concatenate(events or none))
    return Scan(found, sums, list(codes), *map(np.array, (list(codes.values()), lows, highs)))


def runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys (n,) without repetitions beside each other, and how often each stands there."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return keys[starts], np.diff(np.r_[starts, len(keys)])


def summed(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n,) ascending, each once, with the sums of their counts (n,)."""
    if (keys[1:] > keys[:-1]).all():
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return keys[starts], np.add.reduceat(counts[order], starts)


def _add(codes: Counter[str], names: pa.Array | None, counts: np.ndarray) -> None:
    """Adds counts (C,) of names; a code that no event has is none."""
    if names is not None:
        found = np.flatnonzero(counts)
        names = names.take(found).to_pylist()
        for name, count in zip(names, counts[found].tolist(), strict=True):
            codes[name] += count
