"""MEDS folders (medical-event-data-standard/meds 0.3 and 0.4): parquet events to token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .meds_events import EventFile
from .meds_files import MedsError, no_events, parquet_files
from .source import BIRTH, MICROSECONDS_PER_HOUR, NO_TIME, Source, latest, origins_of
from .splits import OwnersSplits, owners_splits
from .vocabulary import CLS, UNK, Vocabulary


class Timeline(NamedTuple):
    """A patient, [CLS] first. hours: since the first timed event kept, 0 for static facts."""

    subject_id: int
    token_ids: torch.Tensor  # (N,) int64
    hours: torch.Tensor  # (N,) float64, non-decreasing
    values: torch.Tensor  # (N,) float32, NaN where the event has none


@dataclass(frozen=True)
class MedsDataset:
    """All patients end to end: patient p owns the events offsets[p] : offsets[p + 1].

    Events are sorted by time within a patient, in file order where times are equal; static facts
    come first, with times = NO_TIME.
    """

    subject_ids: np.ndarray  # (P,) int64
    offsets: np.ndarray  # (P + 1,) int64
    token_ids: np.ndarray  # (E,) int32
    times: np.ndarray  # (E,) int64, microseconds since 1970-01-01
    values: np.ndarray  # (E,) float32
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.subject_ids)

    def lengths(self, max_tokens: int | None = None) -> np.ndarray:
        """Tokens per patient, [CLS] included, after truncation: (P,) int64."""
        lengths = np.diff(self.offsets) + 1
        return lengths if max_tokens is None else np.minimum(lengths, max_tokens)

    def starts(self) -> np.ndarray:
        """(P,) int64: where the events of each patient begin that are no static facts."""
        static = (self.times == NO_TIME).astype(np.int64)
        return self.offsets[:-1] + np.add.reduceat(static, self.offsets[:-1])

    def origins(self) -> np.ndarray:
        """(P,) int64: as origins_of has it, of each patient."""
        tokens = self.vocabulary.tokens
        birth = tokens.index(BIRTH) if BIRTH in tokens else -1
        return origins_of(
            self.offsets[:-1], self.offsets[1:], self.times, self.token_ids == birth
        )

    def timeline(self, index: int, max_tokens: int | None = None) -> Timeline:
        """Patient `index` as tokens: [CLS], the static facts, then the most recent events that fit.

        Raises ValueError for max_tokens below 1.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        static_end = start + int(np.searchsorted(self.times[start:end], NO_TIME, side="right"))
        room = end - start + 1 if max_tokens is None else max_tokens
        kept = latest(start, static_end, end, room)
        times = self.times[kept]
        static = min(static_end - start, len(kept))
        first = times[static] if len(kept) > static else 0
        micros = np.where(times == NO_TIME, 0, times - first)
        return Timeline(
            int(self.subject_ids[index]),
            torch.from_numpy(np.r_[CLS, self.token_ids[kept]].astype(np.int64)),
            torch.from_numpy(np.r_[0, micros] / MICROSECONDS_PER_HOUR),
            torch.from_numpy(np.r_[np.float32("nan"), self.values[kept]]),
        )


def read_meds(
    meds_dir: str | Path,
    *,
    split: str | None = None,
    vocabulary: Vocabulary | None = None,
    min_count: int = 1,
    max_vocab: int | None = None,
) -> MedsDataset:
    """Read a MEDS folder into memory (24 bytes an event).

    split: only the subjects of that split in metadata/subject_splits.parquet, or, without that
        file, only data/<split>/; None reads everything.
    vocabulary: None builds one from the events read, leaving codes seen fewer than min_count
        times, and those past max_vocab tokens, to [UNK]. Give the training split's to the others.
    Raises MedsError (a ValueError) naming meds_dir where the folder cannot be used.
    """
    root = Path(meds_dir)
    paths = parquet_files(root)
    subjects = None
    if split is not None:
        subjects, paths = _select_split(root, paths, split)

    lookup: dict[str, int] = {}  # code -> its number over all files
    files = [_read_file(root, path, lookup) for path in paths]
    subject, times, codes, values = (np.concatenate(column) for column in zip(*files, strict=True))
    if subjects is not None:
        keep = np.isin(subject, subjects)
        subject, times, codes, values = (a[keep] for a in (subject, times, codes, values))
    if not len(subject):
        raise MedsError(no_events(root, len(paths), "" if split is None else f" for {split=}"))

    if vocabulary is None:
        counts = np.bincount(codes, minlength=len(lookup))
        vocabulary = Vocabulary.build(list(lookup), counts, max(min_count, 1), max_vocab)
    token_ids = vocabulary.ids(list(lookup))[codes]
    return in_order(subject, times, token_ids, values, vocabulary)


def in_order(
    subject: np.ndarray,
    times: np.ndarray,
    token_ids: np.ndarray,
    values: np.ndarray,
    vocabulary: Vocabulary,
) -> MedsDataset:
    """Returns events (E,) of whatever order as a dataset, by subject and time."""
    same = subject[1:] == subject[:-1]
    if not (same & (times[1:] >= times[:-1]) | (subject[1:] > subject[:-1])).all():
        order = np.lexsort((times, subject))  # stable: equal times keep the order of the file
        subject, times, token_ids, values = (x[order] for x in (subject, times, token_ids, values))
    starts = np.flatnonzero(np.r_[True, subject[1:] != subject[:-1]])
    return MedsDataset(
        subject_ids=subject[starts],
        offsets=np.r_[starts, len(subject)].astype(np.int64),
        token_ids=token_ids,
        times=times,
        values=values,
        vocabulary=vocabulary,
    )


def meds_source(meds_dir: str | Path) -> Source:
    """Every patient of a MEDS folder. Raises MedsError where the folder cannot be used."""
    root = Path(meds_dir)
    owners = owners_splits(root, parquet_files(root))
    title = f"MEDS folder {root.resolve().name}"
    return as_source(read_meds(root), title, f"meds_dir={str(meds_dir)!r}", owners)


def as_source(
    dataset: MedsDataset, title: str, where: str, owners: OwnersSplits | None
) -> Source:
    """Returns a dataset as a source, with the splits of its owner. title, where: as in Source."""
    return Source(
        name="meds",
        title=title,
        unit="patients",
        where=where,
        subjects=dataset.subject_ids.tolist(),
        begins=dataset.offsets[:-1],
        starts=dataset.starts(),
        ends=dataset.offsets[1:],
        ids=dataset.token_ids,
        vocabulary=dataset.vocabulary,
        times=dataset.times,
        values=dataset.values,
        origins=dataset.origins(),
        splits=None if owners is None else owners.of(dataset.subject_ids),
        splits_digest="" if owners is None else owners.digest,
    )


def unknown_share(dataset: MedsDataset) -> float:
    """The share of events whose code is [UNK]."""
    return float((dataset.token_ids == UNK).mean())


def _select_split(
    root: Path, paths: list[Path], split: str
) -> tuple[np.ndarray | None, list[Path]]:
    """The subject ids of a split, or the files of its folder where nothing lists subjects."""
    owners = owners_splits(root, paths)
    if owners is None:
        found = {path.relative_to(root / "data").parts[0] for path in paths}
        chosen = [path for path in paths if path.relative_to(root / "data").parts[0] == split]
        if chosen:
            return None, chosen
    else:
        found = set(owners.names)
        if split in found:
            return owners.in_split(split), paths
    raise MedsError(
        f"meds_dir={str(root)!r} has no split={split!r}: expected one of {sorted(map(str, found))}"
    )


def _read_file(
    root: Path, path: Path, lookup: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """subject_id, time, code number, numeric_value of a file; new codes are added to lookup."""
    parts, names, numbers = [], None, np.zeros(0, dtype=np.int64)
    with EventFile(root, path) as file:
        for events in file.batches(range(len(file.rows))):
            if events.names is not names:
                names = events.names
                numbers = np.array(
                    [lookup.setdefault(name, len(lookup)) for name in names.to_pylist()],
                    dtype=np.int64,
                )
            parts.append((events.subjects, events.times, numbers[events.codes], events.values))
    empty = (np.zeros(0, kind) for kind in (np.int64, np.int64, np.int64, np.float32))
    subject, time, code, value = (np.concatenate(x) for x in zip(empty, *parts, strict=True))
    return subject, time, code, value
