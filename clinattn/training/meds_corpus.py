"""The patients of a MEDS folder as training sequences, with a label of their future if asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch

from clinattn.workloads import SPECIAL_TOKENS, MedsDataset, Vocabulary, read_meds
from clinattn.workloads.meds import NO_TIME
from clinattn.workloads.vocabulary import CLS, MASK

from .data import Corpus, Example, windows
from .seeds import is_held_out
from .settings import Settings


def meds_corpus(settings: Settings, vocabulary: Vocabulary | None = None) -> Corpus:
    """Patients, not events, are held out; the vocabulary is that of the others.

    Raises MedsError or ValueError where the folder, or label_code in it, cannot be used.
    """
    assert settings.meds_dir is not None
    dataset = read_meds(settings.meds_dir)
    codes = dataset.vocabulary.tokens
    held_out = np.array([is_held_out(s, settings.held_out) for s in dataset.subject_ids.tolist()])
    if vocabulary is None:
        training = np.repeat(~held_out, np.diff(dataset.offsets))
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
    dataset = replace(
        dataset, token_ids=vocabulary.ids(codes)[dataset.token_ids], vocabulary=vocabulary
    )
    splits: tuple[list[Example], list[Example]] = ([], [])
    for patient in range(len(dataset)):
        examples = (
            _stretches(dataset, patient, settings)
            if marks is None
            else _futures(dataset, patient, marks, settings)
        )
        splits[int(held_out[patient])].extend(examples)
    if marks is not None and len({label for _, label in splits[0]}) < 2:
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
    )


def _bounds(dataset: MedsDataset, patient: int) -> tuple[int, int, int]:
    """Where the patient's static facts, their timed events and the next patient begin."""
    start, end = (int(x) for x in dataset.offsets[patient : patient + 2])
    return start, int(np.searchsorted(dataset.times[start:end], NO_TIME, "right")) + start, end


def _stretches(dataset: MedsDataset, patient: int, settings: Settings) -> Iterator[Example]:
    """The whole timeline, in consecutive sequences."""
    start, timed, end = _bounds(dataset, patient)
    ids = torch.from_numpy(dataset.token_ids[start:end].astype(np.int64))
    pieces = windows(ids[: timed - start], ids[timed - start :], CLS, settings.max_tokens)
    return (Example(piece) for piece in pieces)


def _futures(
    dataset: MedsDataset, patient: int, marks: np.ndarray, settings: Settings
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
    for cut, next_cut in zip(edges[1:], edges[2:], strict=False):
        past = np.arange(timed, timed + cut)
        past = past[~marks[past]]
        kept = np.r_[static, past[max(0, len(past) - (room - len(static))) :]]
        label = marks[timed + cut : timed + next_cut].any()
        ids = torch.from_numpy(np.r_[CLS, dataset.token_ids[kept]].astype(np.int64))
        yield Example(ids, int(label))
