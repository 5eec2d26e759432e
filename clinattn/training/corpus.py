"""A source as training sequences: whole subjects held out, windows of events, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from clinattn.workloads import Vocabulary
from clinattn.workloads.opening import open_source, parse_data
from clinattn.workloads.source import Source
from clinattn.workloads.splits import Division, divide
from clinattn.workloads.timelines import BESIDE, Progress, silent
from clinattn.workloads.tokenizer import SEPARATORS, TextTokenizer

from .cuts import futures, matching_of
from .data import Corpus
from .examples import Examples, Listed, sampled
from .reading import Reader, fit_standard
from .sequences import Example, windows
from .settings import TrainingSettings
from .standard import Standard
from .texts import open_texts
from .windowed import Windows
from .windows import note_windows


def read_corpus(
    settings: TrainingSettings,
    vocabulary: Vocabulary | None = None,
    *,
    times: bool = False,
    values: bool = False,
    standard: Standard | None = None,
    vocab_size: int = 8192,
    tokenizer: TextTokenizer | None = None,
    progress: Progress = silent,
) -> Corpus:
    """The sequences of settings.data, divided as splits.divide does; others are left alone.

    The vocabulary is that of the subjects to train on. times: tokens have days, as Source.days
        gives them. values: they have values, on the scale of `standard`, or else of the subjects
        to train on. vocab_size: of a length profile.
    tokenizer: of texts, in place of settings.tokenizer. A text longer than max_tokens is several
        sequences, for a classifier windows that overlap.
    Raises MedsError or ValueError where the source, or label_code in it, cannot be used.
    """
    assert settings.data is not None
    texts = parse_data(settings.data).kind == "text"
    if texts:
        source, tokenizer = open_texts(settings, tokenizer)
    else:
        source = open_source(
            settings.data,
            max_tokens=settings.room,
            vocab_size=vocab_size,
            seed=settings.seed,
            beside=Path(settings.output) / BESIDE,
            progress=progress,
        )
    division = divide(source, settings.held_out)
    fitted = source.until(division.train)
    vocabulary = _vocabulary(source, settings, fitted, vocabulary)
    classes = _classes(source, settings, division)
    if values and source.values is not None and standard is None:
        standard = fit_standard(source, vocabulary, fitted)
    reader = Reader(source, vocabulary, times, standard if values else None)
    numbers = subject_numbers(source, division)
    matching = matching_of(source, settings.label_code)

    def examples(chosen: np.ndarray) -> Examples:
        at = np.flatnonzero(chosen)
        if matching is not None:
            return futures(reader, at, matching, settings)
        if texts:
            return Listed(_of_texts(reader, at, numbers[at], classes, settings))
        # a pair has its [SEP] put by Pairs
        last = None if settings.nsp else vocabulary.end
        return Windows(reader, at, numbers[at], settings.room, last)

    train, evaluated = examples(division.train), examples(division.evaluated)
    if matching is not None:
        classes = ("absent", "present")
        if len(set(train.labels().tolist())) < 2:
            raise ValueError(
                f"label_code={settings.label_code!r} gives all {len(train)} training sequences "
                "the same class: expected both"
            )
    sample = sampled(evaluated, settings.eval_tokens)
    return Corpus(
        source=f"{source.counted} ({division.line}{sample.line})",
        tokens=vocabulary.tokens,
        special=vocabulary.special,
        mask=vocabulary.mask,
        train=train,
        held_out=sample.examples,
        classes=classes,
        sep=vocabulary.sep if settings.nsp else None,
        standard=standard,
        evaluated=division.name,
        split=division.record,
        unknown=vocabulary.unknown if texts else None,
        tokenizer=None if tokenizer is None else tokenizer.json(),
    )


def subject_numbers(source: Source, division: Division) -> np.ndarray:
    """(S,) int64: a number for the subject of each sequence that training reads, from 0."""
    numbers = np.zeros(len(source), dtype=np.int64)
    read = np.flatnonzero(division.train | division.evaluated)
    if source.times is not None:  # a timeline is all of its subject
        numbers[read] = np.arange(len(read))
        return numbers
    of: dict[int | str, int] = {}
    numbers[read] = [of.setdefault(source.subjects[i], len(of)) for i in read.tolist()]
    return numbers


def _of_texts(
    reader: Reader,
    at: np.ndarray,
    subjects: np.ndarray,
    classes: tuple[str, ...],
    settings: TrainingSettings,
) -> Iterator[Example]:
    """The windows of notes, with the label of their note where there are classes."""
    source, vocabulary = reader.source, reader.vocabulary
    last = None if settings.nsp else vocabulary.end
    for index, subject in zip(at.tolist(), subjects.tolist(), strict=True):
        events = reader.whole(index)
        if not classes or source.labels is None:
            yield from windows(
                events.take(slice(0)), events, vocabulary.cls, settings.room, subject, end=last
            )
            continue
        label = classes.index(str(source.labels[index]))
        for window in note_windows(
            events.ids, vocabulary, settings.room, settings.overlap, settings.pool
        ):
            yield replace(window, label=label, subject=subject)


def _vocabulary(
    source: Source, settings: TrainingSettings, fitted: np.ndarray, given: Vocabulary | None
) -> Vocabulary:
    """The vocabulary given, or that of the events before fitted[i]; [SEP] is special in it.

    Raises ValueError where a tokenizer has not what is asked for.
    """
    if not source.closed:
        if given is not None:
            return given
        return source.vocabulary_of(fitted, settings.min_count, settings.max_vocab)
    own, name = source.vocabulary, f"tokenizer={str(settings.tokenizer)!r}"
    if given is not None and given.tokens != own.tokens:
        raise ValueError(f"{name} has other tokens than the checkpoint of init")
    if not settings.nsp:
        return own
    if own.sep is None:
        raise ValueError(f"{name} has none of {SEPARATORS}: expected one")
    return replace(own, special=own.special | {own.sep})


def _classes(source: Source, settings: TrainingSettings, division: Division) -> tuple[str, ...]:
    """Sorted labels of the training split; () where labels are not asked for.

    Raises ValueError for fewer than two, or others in the split to evaluate.
    """
    if settings.task != "classify" or source.labels is None:
        return ()
    labels = np.array([str(label) for label in source.labels], dtype=object)
    classes = sorted(set(labels[division.train]))
    unseen = set(labels[division.evaluated]) - set(classes)
    if len(classes) < 2 or unseen:
        raise ValueError(
            f"{source.where} has training labels {classes} and besides these, held out, "
            f"{sorted(unseen)}: expected two or more, and no others"
        )
    return tuple(classes)
