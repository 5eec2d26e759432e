"""The rows of a CSV or JSONL file as training sequences, by words or by a tokenizer.json."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clinattn.files.disk import parse_json
from clinattn.workloads.vocabulary import CLS, MASK, SEP, SPECIAL_TOKENS, Vocabulary

from .data import Corpus, Example, Tokens, windows
from .seeds import is_held_out
from .settings import Settings

WORD = re.compile(r"\w+|[^\w\s]")
FORMATS = "a .csv file with a header, or a .jsonl file, with columns text and label"


class Row(NamedTuple):
    text: str
    label: str | None
    subject: str  # rows of one subject are in one split


@dataclass(frozen=True)
class Ids:
    """The ids of each row, and what they stand for."""

    rows: list[Tensor]
    tokens: tuple[str, ...]
    special: frozenset[int]
    cls: int
    mask: int
    sep: int | None


def text_corpus(settings: Settings, vocabulary: Vocabulary | None = None) -> Corpus:
    """Rows are held out by their column subject_id, or by their text where there is none.

    A text longer than max_tokens is cut for a classifier, and is several sequences otherwise.
    Raises ValueError for a file that cannot be used.
    """
    assert settings.text_file is not None
    path = Path(settings.text_file)
    rows = read_rows(path, labelled=settings.task == "classify")
    held_out = [is_held_out(row.subject, settings.held_out) for row in rows]
    if settings.tokenizer is None:
        ids = _by_words(rows, held_out, settings, vocabulary)
    else:
        ids = _by_tokenizer(rows, Path(settings.tokenizer), vocabulary, settings.nsp)
    classes: list[str] = []
    if settings.task == "classify":
        classes = _classes(path, rows, held_out)
    splits: tuple[list[Example], list[Example]] = ([], [])
    subjects: dict[str, int] = {}
    for row, out, row_ids in zip(rows, held_out, ids.rows, strict=True):
        subject = subjects.setdefault(row.subject, len(subjects))
        pieces = windows(Tokens(row_ids[:0]), Tokens(row_ids), ids.cls, settings.room, subject)
        if classes:
            splits[out].append(replace(pieces[0], label=classes.index(str(row.label))))
        else:
            splits[out].extend(pieces)
    return Corpus(
        source=f"{path.name}, {len(rows)} rows, {sum(held_out)} of them held out",
        tokens=ids.tokens,
        special=ids.special,
        mask=ids.mask,
        train=splits[0],
        held_out=splits[1],
        classes=tuple(classes),
        sep=ids.sep,
    )


def read_rows(path: Path, labelled: bool) -> list[Row]:
    """The rows with their line in every complaint; label is required only if labelled."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"text_file={str(path)!r}: expected {FORMATS}")
    try:
        records = list(_csv(path) if path.suffix == ".csv" else _jsonl(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"text_file={str(path)!r} cannot be read: {error}") from None
    if not records:
        raise ValueError(f"text_file={str(path)!r} has no rows: expected {FORMATS}")
    rows = []
    for line, record in records:
        for name in ("text", "label") if labelled else ("text",):
            if record.get(name) in (None, ""):
                raise ValueError(
                    f"text_file={str(path)!r} line {line} has no {name!r} (it has "
                    f"{sorted(map(str, record))}): expected {FORMATS}"
                )
        label = record.get("label")
        subject = record.get("subject_id")
        subject = record["text"] if subject in (None, "") else subject
        rows.append(Row(str(record["text"]), None if label is None else str(label), str(subject)))
    return rows


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for record in reader:
            yield reader.line_num, record


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = parse_json(text)
            except ValueError as error:
                raise ValueError(f"text_file={str(path)!r} line {line}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"text_file={str(path)!r} line {line}: expected a JSON object")
            yield line, record


def _classes(path: Path, rows: list[Row], held_out: list[bool]) -> list[str]:
    """Sorted classes of the training split. Raises ValueError for fewer than two or unseen ones."""
    classes = sorted({str(row.label) for row, out in zip(rows, held_out, strict=True) if not out})
    unseen = {str(row.label) for row in rows} - set(classes)
    if len(classes) < 2 or unseen:
        raise ValueError(
            f"text_file={str(path)!r} has training labels {classes} and besides these, held out, "
            f"{sorted(unseen)}: expected two or more, and no others"
        )
    return classes


def _by_words(
    rows: list[Row], held_out: list[bool], settings: Settings, vocabulary: Vocabulary | None
) -> Ids:
    """Lower-cased words and signs, the vocabulary being that of the training split."""
    words = [WORD.findall(row.text.lower()) for row in rows]
    if vocabulary is None:
        counts = Counter(
            w for row, out in zip(words, held_out, strict=True) if not out for w in row
        )
        vocabulary = Vocabulary.build(
            list(counts), np.array(list(counts.values())), settings.min_count, settings.max_vocab
        )
    index = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = index["[UNK]"]
    ids = [torch.tensor([index.get(w, unknown) for w in row], dtype=torch.int64) for row in words]
    sep = SEP if settings.nsp else None
    return Ids(ids, vocabulary.tokens, frozenset(range(len(SPECIAL_TOKENS))), CLS, MASK, sep)


def _by_tokenizer(rows: list[Row], path: Path, vocabulary: Vocabulary | None, pairs: bool) -> Ids:
    """The ids of a tokenizer.json, whose special tokens are kept as they are."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ValueError(f"tokenizer={str(path)!r} needs: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"tokenizer={str(path)!r} cannot be read: {error}") from None
    names = {i: name for name, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = tuple(names.get(i, f"[unused {i}]") for i in range(max(names) + 1))
    if vocabulary is not None and vocabulary.tokens != tokens:
        raise ValueError(f"tokenizer={str(path)!r} has other tokens than the checkpoint of init")
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    cls = _first(tokenizer, path, ("[CLS]", "<s>"))
    mask = _first(tokenizer, path, ("[MASK]", "<mask>"))
    sep = _first(tokenizer, path, ("[SEP]", "</s>")) if pairs else None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([row.text for row in rows], add_special_tokens=False)
    return Ids(
        [torch.tensor(e.ids, dtype=torch.int64) for e in encoded],
        tokens,
        frozenset(special | {i for i in (cls, mask, sep) if i is not None}),
        cls,
        mask,
        sep,
    )


def _first(tokenizer: Any, path: Path, spellings: tuple[str, ...]) -> int:
    """The id of the first spelling that the tokenizer has."""
    ids = [tokenizer.token_to_id(spelling) for spelling in spellings]
    known = [i for i in ids if i is not None]
    if not known:
        raise ValueError(f"tokenizer={str(path)!r} has none of {spellings}: expected one")
    return known[0]
