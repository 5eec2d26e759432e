"""A source as training sequences: whole subjects held out, windows of events, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch

from clinattn.encoder.heads import IGNORE
from clinattn.workloads import SPECIAL_TOKENS, Vocabulary
from clinattn.workloads.opening import open_source, parse_data
from clinattn.workloads.source import Source
from clinattn.workloads.splits import Division, divide
from clinattn.workloads.tokenizer import SEPARATORS, TextTokenizer

from .data import Corpus, Example, Tokens, sequence, windows
from .settings import TrainingSettings
from .standard import Standard
from .texts import open_texts
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
    if parse_data(settings.data).kind == "text":
        source, tokenizer = open_texts(settings, tokenizer)
    else:
        source = open_source(
            settings.data, max_tokens=settings.room, vocab_size=vocab_size, seed=settings.seed
        )
    division = divide(source, settings.held_out)
    fitted = source.of_events(division.train)
    vocabulary = _vocabulary(source, settings, fitted, vocabulary)
    marks = marks_of(source, settings.label_code)
    classes = _classes(source, settings, division)
    if values and source.values is not None and standard is None:
        standard = fit_standard(source, vocabulary, fitted)
    events = tokens_of(source, vocabulary, times=times, standard=standard if values else None)

    splits: tuple[list[Example], list[Example]] = ([], [])
    numbers: dict[int | str, int] = {}
    for index in np.flatnonzero(division.train | division.evaluated).tolist():
        subject = numbers.setdefault(source.subjects[index], len(numbers))
        start, timed, end = source.bounds(index)
        if marks is not None:
            examples = list(_futures(source, events, index, subject, marks, settings))
        else:
            static, others = events.take(slice(start, timed)), events.take(slice(timed, end))
            if classes and source.labels is not None:
                label = classes.index(str(source.labels[index]))
                examples = [
                    replace(window, label=label, subject=subject)
                    for window in note_windows(
                        others.ids, vocabulary, settings.room, settings.overlap, settings.pool
                    )
                ]
            else:
                # a pair has its [SEP] put by Pairs
                last = None if settings.nsp else vocabulary.end
                examples = windows(
                    static, others, vocabulary.cls, settings.room, subject, end=last
                )
        splits[int(division.evaluated[index])].extend(examples)
    if marks is not None and len({example.label for example in splits[0]}) < 2:
        raise ValueError(
            f"label_code={settings.label_code!r} gives all {len(splits[0])} training sequences "
            "the same class: expected both"
        )
    return Corpus(
        source=f"{source.counted} ({division.line})",
        tokens=vocabulary.tokens,
        special=vocabulary.special,
        mask=vocabulary.mask,
        train=splits[0],
        held_out=splits[1],
        classes=classes if marks is None else ("absent", "present"),
        sep=vocabulary.sep if settings.nsp else None,
        standard=standard,
        evaluated=division.name,
        split=division.record,
        unknown=vocabulary.unknown if source.name == "text" else None,
        tokenizer=None if tokenizer is None else tokenizer.json(),
    )


def tokens_of(
    source: Source, vocabulary: Vocabulary, *, times: bool, standard: Standard | None
) -> Tokens:
    """All events of a source as an encoder takes them, (E,).

    times: they have days. standard: they have values, where the source has some, on this scale.
    """
    ids = torch.from_numpy(source.ids_of(vocabulary))
    measured = None
    if standard is not None and source.values is not None:
        measured = standard(ids, torch.from_numpy(source.values))
    return Tokens(ids, torch.from_numpy(source.days()) if times else None, measured)


def fit_standard(source: Source, vocabulary: Vocabulary, fitted: np.ndarray) -> Standard:
    """The scales of the values of the events fitted, (E,) bool."""
    assert source.values is not None
    known = torch.from_numpy(fitted)
    ids = torch.from_numpy(source.ids_of(vocabulary))
    return Standard.fit(ids[known], torch.from_numpy(source.values)[known], len(vocabulary))


def _vocabulary(
    source: Source, settings: TrainingSettings, fitted: np.ndarray, given: Vocabulary | None
) -> Vocabulary:
    """The vocabulary given, or that of the events fitted; with [SEP] among its special tokens.

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


def marks_of(source: Source, label_code: str | None) -> np.ndarray | None:
    """(E,) bool: the events whose code matches the pattern. Raises ValueError where none does."""
    if label_code is None:
        return None
    codes = source.vocabulary.tokens
    matching = np.array([fnmatchcase(code, label_code) for code in codes])
    if not matching.any():
        raise ValueError(
            f"label_code={label_code!r} matches no code: expected a pattern of codes "
            f"such as {codes[len(SPECIAL_TOKENS)]!r}"
        )
    return matching[source.ids]


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


class Cut(NamedTuple):
    """A moment of a timeline to predict at.

    static, past: indices of the events of the source that a classifier then sees, static facts and
    the latest before the cut. end: the index of the first event after the cut; until: that of the
    first which the label no longer depends on.
    """

    static: np.ndarray
    past: np.ndarray
    end: int
    until: int

    def sequence(
        self, source: Source, events: Tokens, label: float = IGNORE, subject: int = 0
    ) -> Example:
        """Returns the sequence that the classifier reads. events: of the whole source."""
        static, past = (events.take(torch.from_numpy(x)) for x in (self.static, self.past))
        return sequence(source.vocabulary.cls, static, past, label, subject)


def cuts_of(
    source: Source, index: int, marks: np.ndarray, settings: TrainingSettings
) -> list[Cut]:
    """The cuts of a sequence that training makes, from the first to the last.

    A cut lies where the time changes: what happens at one time is all input or all future.
    """
    assert source.times is not None
    _, timed, end = source.bounds(index)
    times = source.times[timed:end]
    parts = settings.cuts + 1
    cuts = [len(times) * part // parts for part in range(1, parts)]
    first = [int(np.searchsorted(times, times[cut])) for cut in cuts if cut < len(times)]
    edges = sorted({0, *first, len(times)})
    return [
        cut_at(source, index, marks, settings, timed + cut, timed + next_cut)
        for cut, next_cut in zip(edges[1:], edges[2:], strict=False)
    ]


def cut_at(
    source: Source,
    index: int,
    marks: np.ndarray | None,
    settings: TrainingSettings,
    end: int,
    until: int,
) -> Cut:
    """The cut of a sequence before the event `end`. Events with a mark are not seen."""
    start, timed, _ = source.bounds(index)
    room = settings.max_tokens - 1
    static, past = np.arange(start, timed), np.arange(timed, end)
    if marks is not None:
        static, past = static[~marks[static]], past[~marks[past]]
    static = static[: room // 2]
    return Cut(static, past[max(0, len(past) - (room - len(static))) :], end, until)


def _futures(
    source: Source,
    events: Tokens,
    index: int,
    subject: int,
    marks: np.ndarray,
    settings: TrainingSettings,
) -> Iterator[Example]:
    """The latest events before each cut, labelled by whether a mark stands before the next one."""
    for cut in cuts_of(source, index, marks, settings):
        label = int(marks[cut.end : cut.until].any())
        yield cut.sequence(source, events, label, subject)
