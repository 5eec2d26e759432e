"""The patients of a MEDS folder as training sequences, with a label of their future if asked."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch

from clinattn.workloads import SPECIAL_TOKENS, MedsDataset, Vocabulary, read_meds
from clinattn.workloads.meds import MICROSECONDS_PER_HOUR, NO_TIME
from clinattn.workloads.vocabulary import CLS, MASK, SEP

from .data import Corpus, Example, Tokens, sequence, windows
from .seeds import is_held_out
from .settings import Settings
from .standard import Standard

BIRTH = "MEDS_BIRTH"
MICROSECONDS_PER_DAY = 24 * MICROSECONDS_PER_HOUR


def meds_corpus(
    settings: Settings,
    vocabulary: Vocabulary | None = None,
    *,
    times: bool = False,
    values: bool = False,
    standard: Standard | None = None,
) -> Corpus:
    """Patients, not events, are held out; the vocabulary is that of the others.

    times: tokens have days, a patient's age where MEDS_BIRTH says it and else the time since their
        first timed event. values: they have values, by `standard` or else by that of the others.
    Raises MedsError or ValueError where the folder, or label_code in it, cannot be used.
    """
    assert settings.meds_dir is not None
    dataset = read_meds(settings.meds_dir)
    codes = dataset.vocabulary.tokens
    held_out = np.array([is_held_out(s, settings.held_out) for s in dataset.subject_ids.tolist()])
    training = np.repeat(~held_out, np.diff(dataset.offsets))
    if vocabulary is None:
        counts = np.bincount(dataset.token_ids[training], minlength=len(codes))
        vocabulary = Vocabulary.build(codes, counts, settings.min_count, settings.max_vocab)
    marks = None
    if settings.label_code is not None:
        matching = np.array([fnmatchcase(code, settings.label_code) for code in codes])
        if not matching.any():
            raise ValueError(
                f"label_code={settings.label_code!r} matches no code: expected a pattern of codes "
                f"such as {codes[len(SPECIAL_TOKENS)]!r}"
            )
        marks = matching[dataset.token_ids]
    ids = torch.from_numpy(vocabulary.ids(codes)[dataset.token_ids].astype(np.int64))
    measured = None
    if values:
        measured = torch.from_numpy(dataset.values)
        if standard is None:
            known = torch.from_numpy(training)
            standard = Standard.fit(ids[known], measured[known], len(vocabulary))
        measured = standard(ids, measured)
    events = Tokens(ids, torch.from_numpy(days(dataset)) if times else None, measured)
    splits: tuple[list[Example], list[Example]] = ([], [])
    for patient in range(len(dataset)):
        examples = (
            _stretches(dataset, events, patient, settings)
            if marks is None
            else _futures(dataset, events, patient, marks, settings)
        )
        splits[int(held_out[patient])].extend(examples)
    if marks is not None and len({example.label for example in splits[0]}) < 2:
        raise ValueError(
            f"label_code={settings.label_code!r} gives all {len(splits[0])} training sequences "
            "the same class: expected both"
        )
    return Corpus(
        source=f"MEDS folder {Path(settings.meds_dir).resolve().name}, "
        f"{len(dataset)} patients, {int(held_out.sum())} of them held out",
        tokens=vocabulary.tokens,
        special=frozenset(range(len(SPECIAL_TOKENS))),
        mask=MASK,
        train=splits[0],
        held_out=splits[1],
        classes=() if marks is None else ("absent", "present"),
        sep=SEP if settings.nsp else None,
        standard=standard,
    )


def days(dataset: MedsDataset) -> np.ndarray:
    """(E,) fp64, of every event since the patient's birth or first timed event; 0 if static.

    dataset has the codes of the folder, MEDS_BIRTH among them.
    """
    timed = dataset.times != NO_TIME
    births = np.zeros(len(timed), dtype=bool)
    if BIRTH in dataset.vocabulary.tokens:
        births = timed & (dataset.token_ids == dataset.vocabulary.tokens.index(BIRTH))
    origin = np.zeros(len(dataset), dtype=np.int64)
    patients = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    for known in (timed, births):  # the later overrules
        at = np.flatnonzero(known)
        owners, first = np.unique(patients[at], return_index=True)
        origin[owners] = dataset.times[at[first]]
    passed = np.where(timed, dataset.times, origin[patients]) - origin[patients]
    return passed / MICROSECONDS_PER_DAY


def _bounds(dataset: MedsDataset, patient: int) -> tuple[int, int, int]:
    """Where the patient's static facts, their timed events and the next patient begin."""
    start, end = (int(x) for x in dataset.offsets[patient : patient + 2])
    return start, int(np.searchsorted(dataset.times[start:end], NO_TIME, "right")) + start, end


def _stretches(
    dataset: MedsDataset, events: Tokens, patient: int, settings: Settings
) -> list[Example]:
    """The whole timeline, in consecutive sequences."""
    start, timed, end = _bounds(dataset, patient)
    static, dynamic = events.take(slice(start, timed)), events.take(slice(timed, end))
    return windows(static, dynamic, CLS, settings.room, subject=patient)


def _futures(
    dataset: MedsDataset, events: Tokens, patient: int, marks: np.ndarray, settings: Settings
) -> Iterator[Example]:
    """The latest events before each cut, labelled by whether a mark stands before the next one.

    A cut lies where the time changes: what happens at one time is all input or all future.
    """
    start, timed, end = _bounds(dataset, patient)
    times = dataset.times[timed:end]
    parts = settings.cuts + 1
    cuts = [len(times) * part // parts for part in range(1, parts)]
    first = [int(np.searchsorted(times, times[cut])) for cut in cuts if cut < len(times)]
    edges = sorted({0, *first, len(times)})
    room = settings.max_tokens - 1
    static = np.arange(start, timed)
    static = static[~marks[static]][: room // 2]
    known = events.take(torch.from_numpy(static))
    for cut, next_cut in zip(edges[1:], edges[2:], strict=False):
        past = np.arange(timed, timed + cut)
        past = past[~marks[past]]
        kept = past[max(0, len(past) - (room - len(static))) :]
        label = int(marks[timed + cut : timed + next_cut].any())
        yield sequence(CLS, known, events.take(torch.from_numpy(kept)), label, patient)
