"""The split of each sequence: the one that the data's owner lists, or else by a hash."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .meds_files import MedsError, read_columns
from .source import Source

TRAIN, TUNING, HELD_OUT = "train", "tuning", "held_out"  # as MEDS calls them
ALL = "all"  # every sequence, whatever its split
UNLISTED = ""  # the split of a subject whom the owner's list does not name
LIST = Path("metadata") / "subject_splits.parquet"
AT_ONCE = 1 << 16  # pairs of a list that are text at a time


@dataclass(frozen=True)
class OwnersSplits:
    """A list of subjects, ascending, each with a split: names[numbers[i]] is that of subjects[i].

    digest: the same for the same list, wherever it is.
    """

    subjects: np.ndarray  # (L,) int64
    numbers: np.ndarray  # (L,) int32
    names: tuple[str, ...]
    digest: str

    def numbers_of(self, subjects: np.ndarray) -> np.ndarray:
        """(S,) int32: the number of each subject's split, -1 for one who is not listed."""
        at = np.searchsorted(self.subjects, subjects)
        listed = np.isin(subjects, self.subjects)
        found = np.full(len(subjects), -1, dtype=np.int32)
        found[listed] = self.numbers[at[listed]]
        return found

    def of(self, subjects: np.ndarray) -> list[str | None]:
        """The split of each subject (S,), None for one who is not listed."""
        return named(self.numbers_of(subjects), self.names)

    def in_split(self, split: str) -> np.ndarray:
        """The subjects of a split, none for an unknown one: (n,) int64."""
        number = self.names.index(split) if split in self.names else -1
        return self.subjects[self.numbers == number]


def named(numbers: np.ndarray, names: Sequence[str]) -> list[str | None]:
    """The names of numbers (S,), None for -1."""
    return np.array([*names, None], dtype=object)[numbers].tolist()


def owners_splits(
    root: Path, paths: list[Path], subjects_in: Callable[[Path], np.ndarray] | None = None
) -> OwnersSplits | None:
    """Returns the splits of a MEDS folder by its list, or else by its folders; None without both.

    The list is metadata/subject_splits.parquet (SubjectSplitSchema of the package meds). Folders
    say splits where all files are in data/train, data/tuning and data/held_out, and not all in one.
    subjects_in: the subjects of a file, where they are known; else files are read for them.
    Raises MedsError for a list with nulls, of other types, or with a subject in two splits.
    """
    where = f"meds_dir={str(root)!r}"
    listed = root / LIST
    if listed.exists():
        return one_each(*_listed(root, listed), where)
    folders = [path.relative_to(root / "data").parts[0] for path in paths]
    if len(set(folders)) < 2 or not {TRAIN} <= set(folders) <= {TRAIN, TUNING, HELD_OUT}:
        return None
    read = subjects_in or partial(_subjects_in, root)
    return of_folders([np.unique(read(path)) for path in paths], folders, where)


def of_folders(
    subjects: Sequence[np.ndarray], folders: Sequence[str], where: str
) -> OwnersSplits:
    """Returns the splits of files by the folders that they are in. subjects: of each file."""
    names = sorted(set(folders))
    numbers = np.repeat([names.index(x) for x in folders], [len(own) for own in subjects])
    return one_each(np.concatenate(subjects), numbers, names, where)


def one_each(
    subjects: np.ndarray, numbers: np.ndarray, names: Sequence[str], where: str
) -> OwnersSplits:
    """Returns the splits of pairs: subjects (L,), and numbers (L,), places in `names`.

    Raises MedsError for a subject in two.
    """
    ranked = sorted(names)
    numbers = np.array([ranked.index(name) for name in names], dtype=np.int32)[numbers]
    order = np.lexsort((numbers, subjects))
    subjects, numbers = subjects[order].astype(np.int64), numbers[order]
    again = np.zeros(len(subjects), dtype=bool)
    again[1:] = subjects[1:] == subjects[:-1]
    twice = subjects[1:][again[1:] & (numbers[1:] != numbers[:-1])]
    if len(twice):
        of_twice = [ranked[i] for i in np.unique(numbers[subjects == twice[0]])]
        raise MedsError(f"{where} has subject {twice[0]} in the splits {of_twice}: expected one")
    subjects, numbers = subjects[~again], numbers[~again]
    return OwnersSplits(subjects, numbers, tuple(ranked), _digest(subjects, numbers, ranked))


def _digest(subjects: np.ndarray, numbers: np.ndarray, names: Sequence[str]) -> str:
    """A hash of the sorted list of pairs as Python writes it, which is never in memory whole."""
    digest = hashlib.blake2b(b"[", digest_size=16)
    ends = [f", {name!r})" for name in names]
    for first in range(0, len(subjects), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        pairs = zip(subjects[part].tolist(), numbers[part].tolist(), strict=True)
        text = ", ".join(f"({subject}{ends[number]}" for subject, number in pairs)
        digest.update((", " if first else "").encode() + text.encode())
    digest.update(b"]")
    return digest.hexdigest()


def _subjects_in(root: Path, path: Path) -> np.ndarray:
    return read_columns(root, path, ["subject_id"], [])["subject_id"].to_numpy()


def _listed(root: Path, path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """subject_id and the number of split, of each row, and the names of splits."""
    import pyarrow as pa

    table = read_columns(root, path, ["subject_id", "split"], [])
    where = f"meds_dir={str(root)!r}: {path.relative_to(root)}"
    subject, split = (table.schema.field(name).type for name in ("subject_id", "split"))
    if not pa.types.is_integer(subject):
        raise MedsError(f"{where} column 'subject_id' has type {subject}: expected int64")
    if pa.types.is_dictionary(split):
        split = split.value_type
    if not (pa.types.is_string(split) or pa.types.is_large_string(split)):
        raise MedsError(f"{where} column 'split' has type {split}: expected string")
    for name in ("subject_id", "split"):
        if table[name].null_count:
            raise MedsError(
                f"{where} column {name!r} has {table[name].null_count} nulls: expected none"
            )
    column = table["split"].cast(pa.string()).dictionary_encode().combine_chunks()
    numbers = column.indices.to_numpy()
    return table["subject_id"].to_numpy(), numbers, column.dictionary.to_pylist()


def splits_of(source: Source, share: float) -> np.ndarray:
    """Returns the split of each sequence, (S,) str: the owner's, UNLISTED for what has none.

    Without an owner's list, HELD_OUT are the sequences of about `share` of the subjects, by a hash
    of the subject, and TRAIN are the others.
    """
    if source.splits is None:
        return np.where(source.held_out(share), HELD_OUT, TRAIN).astype(object)
    return np.array([split or UNLISTED for split in source.splits], dtype=object)


def chosen_split(source: Source, split: str, share: float) -> np.ndarray:
    """(S,) bool: the sequences of a split, or of all for ALL.

    Raises ValueError for a split without a sequence.
    """
    if split == ALL:
        return np.ones(len(source), dtype=bool)
    names = splits_of(source, share)
    chosen = names == split
    if not chosen.any():
        known = sorted(set(names) - {UNLISTED})
        raise ValueError(f"split={split!r}: {source.where} has {known}, expected one or {ALL!r}")
    return chosen


@dataclass(frozen=True)
class Division:
    """The parts of a source that training reads. train, evaluated: (S,) bool, of other subjects.

    evaluated: the part that is scored meanwhile. name: of that split, in metrics. record: for a
    checkpoint, by which trained_on knows the subjects again. line: says how it was divided.
    """

    train: np.ndarray
    evaluated: np.ndarray
    name: str
    record: dict[str, str]
    line: str


def divide(source: Source, share: float) -> Division:
    """Divides a source for training.

    Where the owner has listed splits: TRAIN is trained on, and TUNING evaluated, or, where no
    sequence is in TUNING, `share` of TRAIN by the hash. All other splits are left alone, and so
    are subjects whom the list does not name. Without a list: as splits_of.
    Raises ValueError where the owner lists no sequence as TRAIN.
    """
    names = splits_of(source, share)
    if source.splits is None:
        evaluated = names == HELD_OUT
        line = (
            "the data name no splits, so a hash of each subject decides: "
            f"{(~evaluated).sum():,} to train on, {evaluated.sum():,} held out"
        )
        return Division(~evaluated, evaluated, HELD_OUT, {"by": "hash"}, line)
    counts = Counter(names.tolist())
    if not counts[TRAIN]:
        raise ValueError(
            f"{source.where}: its list of splits has no {source.unit} for {TRAIN!r} (it has "
            f"{dict(sorted(counts.items()))}): expected some"
        )
    train, evaluated = names == TRAIN, names == TUNING
    of = f"of {TUNING!r} to evaluate"
    if not evaluated.any():
        evaluated = train & source.held_out(share)
        train &= ~evaluated
        of = f"of {TRAIN!r} to evaluate, by a hash, since none is of {TUNING!r}"
    left = [
        f"{count:,} of {split!r}" if split else f"{count:,} in no split"
        for split, count in sorted(counts.items(), reverse=True)
        if split not in (TRAIN, TUNING)
    ]
    line = (
        f"splits by the data's own list: {train.sum():,} of {TRAIN!r} to train on, "
        f"{evaluated.sum():,} {of}" + (f"; not read: {', '.join(left)}" if left else "")
    )
    record = {"by": "list", "digest": source.splits_digest}
    return Division(train, evaluated, TUNING, record, line)


def trained_on(source: Source, share: float, record: dict[str, Any] | None) -> np.ndarray | None:
    """(S,) bool: what a training with this `share` and Division.record has learnt from.

    None where nobody can tell. record: None of a checkpoint older than records, when all were
    divided by the hash.
    """
    if record is None or record["by"] == "hash":
        return ~source.held_out(share)
    if source.splits is None or source.splits_digest != record["digest"]:
        return None
    return divide(source, share).train


def default_split(source: Source, share: float) -> str:
    """HELD_OUT where a sequence is in it, else TUNING. Raises ValueError for neither."""
    known = sorted(set(splits_of(source, share)) - {UNLISTED})
    for split in (HELD_OUT, TUNING):
        if split in known:
            return split
    raise ValueError(f"split: got none, and {source.where} has {known}: expected one, or {ALL!r}")


class Standing(NamedTuple):
    """trained_on: None where nobody can tell. words: the same, for people."""

    trained_on: bool | None
    words: str


def standing(source: Source, index: int, share: float, record: dict[str, Any] | None) -> Standing:
    """Says whether training has read a sequence. share, record: as in trained_on."""
    held_out = "held out, not trained on"
    seen = trained_on(source, share, record)
    if seen is None:
        return Standing(None, "not known: training had another list of splits than these data")
    if seen[index]:
        return Standing(True, "trained on")
    if record is None or source.splits is None or record["by"] == "hash":
        return Standing(False, held_out)
    division = divide(source, share)
    if division.evaluated[index]:
        return Standing(False, "not trained on, but evaluated while training (tuning)")
    split = source.splits[index] or "in no split"
    return Standing(False, held_out if split == HELD_OUT else f"not trained on ({split})")
