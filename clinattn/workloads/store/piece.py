"""The second pass: the events of a piece, sorted, and what is known of each of its subjects."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..meds import MedsDataset, in_order
from ..meds_events import EventFile
from ..meds_files import MedsError
from ..seeds import hold_out_draw
from ..source import NO_TIME
from ..vocabulary import Vocabulary
from .batches import column, read_batch, write_batch
from .format import CODES, WORK, events_file
from .inputs import Input, changed, require_same
from .plan import Piece


class Patients(NamedTuple):
    """Subjects (P,) ascending. begins, starts, ends: of their events, static facts before starts.

    digests: hashes of their ids, times and values.
    """

    subjects: np.ndarray  # int64
    begins: np.ndarray  # int64
    starts: np.ndarray  # int64
    ends: np.ndarray  # int64
    origins: np.ndarray  # int64
    draws: np.ndarray  # uint64
    digests: np.ndarray  # uint64


def patients_file(folder: Path, number: int) -> Path:
    """The place of the patients of a piece in the folder of work: there when the piece is whole."""
    return folder / WORK / f"patients-{number:05d}.arrow"


def make_piece(root: Path, files: Sequence[Input], piece: Piece, folder: Path) -> None:
    """Reads a piece of a MEDS folder, and writes its events and patients into a store.

    files: those of the piece's parts, in their order. Raises MedsError where they have changed.
    """
    import pyarrow as pa

    for file in files:
        require_same(root, file)
    codes = folder / CODES
    dataset = read_piece(root, files, piece, _vocabulary(codes, codes.stat().st_mtime_ns))
    for file in files:
        require_same(root, file)
    times, values = dataset.times, dataset.values
    events = {
        "id": column(dataset.token_ids, pa.int32()),
        "time": column(times, pa.timestamp("us"), times == NO_TIME),
        "value": column(values, pa.float32(), np.isnan(values)),
    }
    write_batch(folder / events_file(piece.number), events)
    found = patients_of(dataset)
    columns = {name: pa.array(value) for name, value in found._asdict().items()}
    write_batch(patients_file(folder, piece.number), columns)


def read_piece(
    root: Path, files: Sequence[Input], piece: Piece, vocabulary: Vocabulary
) -> MedsDataset:
    """Reads the events of a piece. Raises MedsError where they are not those that were planned."""
    size = piece.events
    subjects, times = (np.empty(size, dtype=np.int64) for _ in range(2))
    ids, values = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.float32)
    done = 0
    for file, (_, groups) in zip(files, piece.parts, strict=True):
        names, table = None, np.zeros(0, dtype=np.int32)
        with EventFile(root, root / file.name) as opened:
            for batch in opened.batches(groups):
                if batch.names is not names:
                    names = batch.names
                    table = vocabulary.ids(names.to_pylist())
                own = (batch.subjects >= piece.low) & (batch.subjects <= piece.high)
                kept = slice(None) if own.all() else np.flatnonzero(own)
                count = len(batch.subjects[kept])
                if done + count > size:
                    raise MedsError(changed(root, file.name))
                part = slice(done, done + count)
                subjects[part], times[part] = batch.subjects[kept], batch.times[kept]
                ids[part], values[part] = table[batch.codes[kept]], batch.values[kept]
                done += count
    if done < size:
        raise MedsError(changed(root, files[0].name))
    values[np.isnan(values)] = np.nan  # of all NaNs the usual one, for equal digests
    return in_order(subjects, times, ids, values, vocabulary)


def patients_of(dataset: MedsDataset) -> Patients:
    """Returns the table of a dataset's patients."""
    draws = [hold_out_draw(subject) for subject in dataset.subject_ids.tolist()]
    return Patients(
        dataset.subject_ids,
        dataset.offsets[:-1],
        dataset.starts(),
        dataset.offsets[1:],
        dataset.origins(),
        np.array(draws, dtype=np.uint64),
        _digests(dataset),
    )


def _digests(dataset: MedsDataset) -> np.ndarray:
    """(P,) uint64: the 8-byte blake2b of each patient's ids, times and values, little-endian."""
    bounds = dataset.offsets.tolist()
    columns = [
        (np.ascontiguousarray(x).data.cast("B"), x.itemsize)
        for x in (dataset.token_ids, dataset.times, dataset.values)
    ]
    (ids, i), (times, t), (values, v) = columns
    digests = bytearray()
    for a, b in zip(bounds, bounds[1:], strict=False):
        digest = hashlib.blake2b(ids[i * a : i * b], digest_size=8)
        digest.update(times[t * a : t * b])
        digest.update(values[v * a : v * b])
        digests += digest.digest()
    return np.frombuffer(bytes(digests), dtype="<u8")


@lru_cache(maxsize=1)
def _vocabulary(path: Path, modified: int) -> Vocabulary:
    """The vocabulary of a store that is being made, read once by a process."""
    return Vocabulary(tuple(read_batch(path)["code"].to_pylist()))
