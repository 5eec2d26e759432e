"""The files that a store is made from, as they were when it was begun."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..meds_events import EventFile
from ..meds_files import MedsError, parquet_files, place
from ..splits import LIST

TAIL = 8  # bytes behind the footer of a parquet file: its length, and PAR1
OTHERS = (LIST, Path("metadata") / "codes.parquet")


class Input(NamedTuple):
    """A file of a MEDS folder. modified: in nanoseconds. footer: a hash of its last part.

    The footer of a parquet file says where and how its columns lie. rows: of its row groups, None
    for a file of metadata.
    """

    name: str
    size: int
    modified: int
    footer: str
    rows: tuple[int, ...] | None


def inputs_of(root: Path) -> tuple[list[Input], bool | None]:
    """Returns the files of a MEDS folder, of events first, and whether their times have a zone.

    None: files differ. Raises MedsError where one cannot be used.
    """
    found, zones = [], set()
    for path in parquet_files(root):
        with EventFile(root, path) as file:
            zones.add(file.zoned)
            found.append(_input(root, path, tuple(file.rows)))
    found += [_input(root, root / name, None) for name in OTHERS if (root / name).is_file()]
    return found, None if {True, False} <= zones else True in zones


def events_in(inputs: Sequence[Input]) -> int:
    """The number of events in all files."""
    return sum(sum(file.rows) for file in inputs if file.rows)


def digest(inputs: Sequence[Input]) -> str:
    """The same for the same files, wherever their folder is."""
    return hashlib.blake2b(repr([tuple(x) for x in inputs]).encode(), digest_size=16).hexdigest()


def require_same(root: Path, before: Input) -> None:
    """Raises MedsError where a file is no longer what it was."""
    try:
        same = _input(root, root / before.name, before.rows) == before
    except OSError:
        same = False
    if not same:
        raise MedsError(changed(root, before.name))


def changed(root: Path, name: str) -> str:
    """Says that a file is not what it was when a store was begun."""
    return (
        f"{place(root, root / name)} has changed since these timelines were begun: expected the "
        "same files until they are whole; another folder begins them anew"
    )


def _input(root: Path, path: Path, rows: tuple[int, ...] | None) -> Input:
    known = path.stat()
    with path.open("rb") as file:
        file.seek(-min(TAIL, known.st_size), os.SEEK_END)
        size = int.from_bytes(file.read(4), "little") + TAIL
        file.seek(-min(size, known.st_size), os.SEEK_END)
        footer = hashlib.blake2b(file.read(size), digest_size=16).hexdigest()
    name = path.relative_to(root).as_posix()
    return Input(name, known.st_size, known.st_mtime_ns, footer, rows)
