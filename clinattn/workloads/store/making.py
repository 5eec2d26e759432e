"""The two passes over the files of a MEDS folder, and what follows from both."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clinattn.files.disk import write_text

from ..code_names import code_descriptions
from ..meds_files import MedsError, no_events
from ..splits import OwnersSplits, owners_splits
from ..vocabulary import Vocabulary
from . import plan, scan
from .batches import column, read_batch, write_batch
from .format import ABOUT, CODES, FORMAT, PATIENTS, WORK, events_file
from .inputs import Input, digest, events_in, require_same
from .piece import make_piece, patients_file
from .processes import Workers

BYTES = 17  # of an event in a store, at most
Progress = Callable[[str, int, int], None]


class Making:
    """The making of a store in a folder that is claimed and begun."""

    def __init__(
        self,
        root: Path,
        folder: Path,
        inputs: Sequence[Input],
        workers: Workers,
        progress: Progress,
    ):
        self.root, self.folder, self.inputs = root, folder, inputs
        self.files = [file for file in inputs if file.rows is not None]
        self.workers, self.progress = workers, progress

    def run(self, zoned: bool | None) -> None:
        """Does both passes, writes codes and patients of the whole, and last store.json."""
        if not events_in(self.inputs):
            raise MedsError(no_events(self.root, len(self.files)))
        units = scan.units_of(self.files, scan.ROWS)
        scans = self._scans(units)
        by_file = plan.of_files(units, scans, len(self.files))
        vocabulary = self._write_codes(scans)
        del scans
        paths = [self.root / file.name for file in self.files]
        subjects = {path: found.subjects for path, found in zip(paths, by_file, strict=True)}
        owners = owners_splits(self.root, paths, subjects.__getitem__)
        pieces = plan.pieces_of(by_file, plan.EVENTS)
        self._write_pieces(pieces)
        fingerprint = self._write_patients(pieces, vocabulary, owners)
        for file in self.inputs:
            require_same(self.root, file)
        names = [CODES, PATIENTS, *(events_file(piece.number) for piece in pieces)]
        said = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "title": f"MEDS folder {self.root.resolve().name}",
            "made_from": f"meds:{self.root.resolve()}",
            "input": digest(self.inputs),
            "has_time_zone": zoned,
            "patients": sum(piece.subjects for piece in pieces),
            "events": [piece.events for piece in pieces],
            "splits": owners and {"digest": owners.digest, "names": owners.names},
            "files": {name: (self.folder / name).stat().st_size for name in names},
        }
        write_text(self.folder / ABOUT, json.dumps(said, indent=1) + "\n", private=True)

    def _scans(self, units: Sequence[scan.Unit]) -> list[scan.Scan]:
        paths = [scan.scan_file(self.folder / WORK, unit) for unit in units]
        tasks, sizes = [], []
        for unit, path in zip(units, paths, strict=True):
            file = self.files[unit.file]
            tasks.append((self.root, file, unit, path))
            sizes.append(sum((file.rows or ())[unit.first : unit.last]))
        whole = [path.exists() for path in paths]
        self._stage("reading codes and patients", scan.make_scan, tasks, sizes, whole)
        return [scan.read_scan(path) for path in paths]

    def _write_codes(self, scans: Sequence[scan.Scan]) -> Vocabulary:
        import pyarrow as pa

        counts: Counter[str] = Counter()
        for found in scans:
            for code, count in zip(found.codes, found.counts.tolist(), strict=True):
                counts[code] += count
        vocabulary = Vocabulary.build(list(counts), np.array(list(counts.values())))
        meanings = code_descriptions(self.root)
        columns = {
            "code": pa.array(vocabulary.tokens, pa.string()),
            "count": pa.array([counts.get(token, 0) for token in vocabulary.tokens], pa.int64()),
            "description": pa.array(map(meanings.get, vocabulary.tokens), pa.string()),
        }
        write_batch(self.folder / CODES, columns)
        return vocabulary

    def _write_pieces(self, pieces: Sequence[plan.Piece]) -> None:
        whole = [
            patients_file(self.folder, piece.number).exists()
            and (self.folder / events_file(piece.number)).exists()
            for piece in pieces
        ]
        sizes = [piece.events for piece in pieces]
        need = BYTES * sum(size for size, kept in zip(sizes, whole, strict=True) if not kept)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"output={str(self.folder)!r}: the timelines take {need // 1000:,} kB more, and "
                f"{free // 1000:,} kB are free: expected as much"
            )
        tasks = [
            (self.root, [self.files[i] for i, _ in piece.parts], piece, self.folder)
            for piece in pieces
        ]
        self._stage("writing timelines", make_piece, tasks, sizes, whole)

    def _stage(
        self,
        title: str,
        work: Callable[..., None],
        tasks: Sequence[tuple[Any, ...]],
        sizes: Sequence[int],
        whole: Sequence[bool],
    ) -> None:
        """Does the tasks that are not whole. sizes: of each, in events."""
        total = sum(sizes)
        done = sum(size for size, kept in zip(sizes, whole, strict=True) if kept)
        left = [i for i, kept in enumerate(whole) if not kept]

        def ended(number: int | None) -> None:
            nonlocal done
            done += 0 if number is None else sizes[left[number]]
            self.progress(f"{title}: {done:,} of {total:,} events", done, total)

        ended(None)
        self.workers.run(work, [tasks[i] for i in left], ended)

    def _write_patients(
        self, pieces: Sequence[plan.Piece], vocabulary: Vocabulary, owners: OwnersSplits | None
    ) -> str:
        """Writes the patients of all pieces by subject, and returns the store's fingerprint."""
        import pyarrow as pa

        parts = [read_batch(patients_file(self.folder, piece.number)) for piece in pieces]
        counts = [piece.subjects for piece in pieces]
        if [len(part) for part in parts] != counts:
            raise MedsError(
                f"{str(self.folder)!r} holds pieces of another plan: expected an empty folder"
            )
        subjects = np.concatenate([part["subjects"].to_numpy() for part in parts])
        order = np.argsort(subjects)
        subjects = subjects[order]
        number = np.repeat(np.arange(len(pieces), dtype=np.int32), counts)[order]
        before = np.cumsum([0, *(piece.events for piece in pieces[:-1])])[number]

        def sorted_column(name: str) -> np.ndarray:
            return np.concatenate([part[name].to_numpy() for part in parts])[order]

        splits = np.full(len(order), -1) if owners is None else owners.numbers_of(subjects)
        # Polars looks at numbers under nulls too, and refuses those that name nothing.
        indices = column(np.maximum(splits, 0).astype(np.int32), pa.int32(), splits < 0)
        names = pa.array([] if owners is None else owners.names, pa.string())
        digests = sorted_column("digests")
        columns = {
            "subject_id": column(subjects, pa.int64()),
            "piece": column(number, pa.int32()),
            "begin": column(sorted_column("begins") + before, pa.int64()),
            "start": column(sorted_column("starts") + before, pa.int64()),
            "end": column(sorted_column("ends") + before, pa.int64()),
            "origin": column(sorted_column("origins"), pa.timestamp("us")),
            "hash": column(sorted_column("draws"), pa.uint64()),
            "split": pa.DictionaryArray.from_arrays(indices, names),
            "digest": column(digests, pa.uint64()),
        }
        write_batch(self.folder / PATIENTS, columns)
        whole = hashlib.blake2b(json.dumps(vocabulary.tokens).encode(), digest_size=16)
        whole.update(subjects.data)
        whole.update(digests.data)
        return whole.hexdigest()
