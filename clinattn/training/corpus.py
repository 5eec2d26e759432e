"""A source as training sequences: whole subjects held out, windows of events, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch

from clinattn.workloads import SPECIAL_TOKENS, Vocabulary
from clinattn.workloads.opening import open_source
from clinattn.workloads.source import Source
from clinattn.workloads.text import SEPARATORS

from .data import Corpus, Example, Tokens, sequence, windows
from .settings import TrainingSettings
from .standard import Standard


def read_corpus(
    settings: TrainingSettings,
    vocabulary: Vocabulary | None = None,
    *,
    times: bool = False,
    values: bool = False,
    standard: Standard | None = None,
    vocab_size: int = 8192,
) -> Corpus:
    """The sequences of settings.data. The vocabulary is that of the subjects not held out.

    times: tokens have days, as Source.days gives them. values: they have values, on the scale of
        `standard`, or else of the subjects not held out. vocab_size: of a length profile.
    A text longer than max_tokens is cut for a classifier, and is several sequences otherwise.
    Raises MedsError or ValueError where the source, or label_code in it, cannot be used.
    """
    assert settings.data is not None
    source = open_source(
        settings.data,
        tokenizer=settings.tokenizer,
        labelled=settings.task == "classify",
        max_tokens=settings.room,
        vocab_size=vocab_size,
        seed=settings.seed,
    )
    held_out = source.held_out(settings.held_out)
    vocabulary = _vocabulary(source, settings, held_out, vocabulary)
    marks = _marks(source, settings.label_code)
    classes = _classes(source, settings, held_out)
    ids = torch.from_numpy(source.ids_of(vocabulary))
    measured = None
    if values and source.values is not None:
        measured = torch.from_numpy(source.values)
        if standard is None:
            known = torch.from_numpy(source.of_events(~held_out))
            standard = Standard.fit(ids[known], measured[known], len(vocabulary))
        measured = standard(ids, measured)
    events = Tokens(ids, torch.from_numpy(source.days()) if times else None, measured)

    splits: tuple[list[Example], list[Example]] = ([], [])
    numbers: dict[int | str, int] = {}
    for index, name in enumerate(source.subjects):
        subject = numbers.setdefault(name, len(numbers))
        start, timed, end = source.bounds(index)
        if marks is not None:
            examples = list(_futures(source, events, index, subject, marks, settings))
        else:
            static, others = events.take(slice(start, timed)), events.take(slice(timed, end))
            examples = windows(static, others, vocabulary.cls, settings.room, subject)
            if classes and source.labels is not None:
                label = classes.index(str(source.labels[index]))
                examples = [replace(examples[0], label=label)]
        splits[int(held_out[index])].extend(examples)
    if marks is not None and len({example.label for example in splits[0]}) < 2:
        raise ValueError(
            f"label_code={settings.label_code!r} gives all {len(splits[0])} training sequences "
            "the same class: expected both"
        )
    return Corpus(
        source=f"{source.counted}, {int(held_out.sum())} of them held out",
        tokens=vocabulary.tokens,
        special=vocabulary.special,
        mask=vocabulary.mask,
        train=splits[0],
        held_out=splits[1],
        classes=classes if marks is None else ("absent", "present"),
        sep=vocabulary.sep if settings.nsp else None,
        standard=standard,
    )


def _vocabulary(
    source: Source, settings: TrainingSettings, held_out: np.ndarray, given: Vocabulary | None
) -> Vocabulary:
    """The vocabulary given, or that of the training split; with [SEP] among its special tokens.

    Raises ValueError where a tokenizer has not what is asked for.
    """
    if not source.closed:
        if given is not None:
            return given
        return source.vocabulary_of(~held_out, settings.min_count, settings.max_vocab)
    own, name = source.vocabulary, f"tokenizer={str(settings.tokenizer)!r}"
    if given is not None and given.tokens != own.tokens:
        raise ValueError(f"{name} has other tokens than the checkpoint of init")
    if not settings.nsp:
        return own
    if own.sep is None:
        raise ValueError(f"{name} has none of {SEPARATORS}: expected one")
    return replace(own, special=own.special | {own.sep})


def _marks(source: Source, label_code: str | None) -> np.ndarray | None:
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


def _classes(source: Source, settings: TrainingSettings, held_out: np.ndarray) -> tuple[str, ...]:
    """Sorted labels of the training split; () where labels are not asked for.

    Raises ValueError for fewer than two, or others in the held-out split.
    """
    if settings.task != "classify" or source.labels is None:
        return ()
    labels = [str(label) for label in source.labels]
    classes = sorted({label for label, out in zip(labels, held_out, strict=True) if not out})
    unseen = set(labels) - set(classes)
    if len(classes) < 2 or unseen:
        raise ValueError(
            f"{source.where} has training labels {classes} and besides these, held out, "
            f"{sorted(unseen)}: expected two or more, and no others"
        )
    return tuple(classes)


def _futures(
    source: Source,
    events: Tokens,
    index: int,
    subject: int,
    marks: np.ndarray,
    settings: TrainingSettings,
) -> Iterator[Example]:
    """The latest events before each cut, labelled by whether a mark stands before the next one.

    A cut lies where the time changes: what happens at one time is all input or all future.
    """
    assert source.times is not None
    start, timed, end = source.bounds(index)
    times = source.times[timed:end]
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
        past_events = events.take(torch.from_numpy(kept))
        yield sequence(source.vocabulary.cls, known, past_events, label, subject)
