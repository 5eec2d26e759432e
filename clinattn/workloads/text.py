"""The rows of a CSV or JSONL file as a source, by words or by a tokenizer.json."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clinattn.files.disk import parse_json

from .source import Source
from .vocabulary import Vocabulary

WORD = re.compile(r"\w+|[^\w\s]")
FORMATS = "a .csv file with a header, or a .jsonl file, with columns text and label"
SEPARATORS = ("[SEP]", "</s>")  # spellings of [SEP] in tokenizers


class Row(NamedTuple):
    text: str
    label: str | None
    subject: str  # rows of one subject are in one split


def text_source(
    text_file: str | Path, tokenizer: str | Path | None = None, labelled: bool = False
) -> Source:
    """The rows of a file. Their subject is the column subject_id, or the text where it is absent.

    tokenizer: None takes lower-cased words and signs. labelled: a row needs a label.
    Raises ValueError for a file that cannot be used.
    """
    path = Path(text_file)
    rows = read_rows(path, labelled)
    texts = [row.text for row in rows]
    if tokenizer is None:
        ids, vocabulary = _by_words(texts)
    else:
        ids, vocabulary = _by_tokenizer(texts, Path(tokenizer))
    if not any(ids):
        raise ValueError(f"text_file={str(path)!r} has no words in its rows: expected some")
    offsets = np.r_[0, np.cumsum([len(row) for row in ids])].astype(np.int64)
    return Source(
        name="text",
        title=path.name,
        unit="rows",
        where=f"text_file={str(path)!r}",
        subjects=[row.subject for row in rows],
        offsets=offsets,
        starts=offsets[:-1],
        ids=np.array([i for row in ids for i in row], dtype=np.int64),
        vocabulary=vocabulary,
        closed=tokenizer is not None,
        labels=[row.label for row in rows],
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


def lower_words(text: str) -> Iterator[re.Match[str]]:
    """Yields the words and signs of a text; their places are those in text.lower()."""
    return WORD.finditer(text.lower())


def _by_words(texts: list[str]) -> tuple[list[list[int]], Vocabulary]:
    """The words of each text as ids, and the vocabulary of all of them."""
    words = [[found[0] for found in lower_words(text)] for text in texts]
    counts = Counter(word for row in words for word in row)
    vocabulary = Vocabulary.build(list(counts), np.array(list(counts.values())))
    index = {token: i for i, token in enumerate(vocabulary.tokens)}
    return [[index[word] for word in row] for row in words], vocabulary


def _by_tokenizer(texts: list[str], path: Path) -> tuple[list[list[int]], Vocabulary]:
    """The ids of a tokenizer.json, whose special tokens are kept as they are."""
    tokenizer, vocabulary = read_tokenizer(path)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [row.ids for row in encoded], vocabulary


def read_tokenizer(path: Path) -> tuple[Any, Vocabulary]:
    """A tokenizer of the package tokenizers, which neither cuts nor pads, and its vocabulary.

    Raises ValueError for a file that is none, or has no [CLS] or no [MASK].
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ValueError(f"tokenizer={str(path)!r} needs: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"tokenizer={str(path)!r} cannot be read: {error}") from None
    names = {i: name for name, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder().items()
    cls = _needed(tokenizer, path, ("[CLS]", "<s>"))
    mask = _needed(tokenizer, path, ("[MASK]", "<mask>"))
    vocabulary = Vocabulary(
        tokens=tuple(names.get(i, f"[unused {i}]") for i in range(max(names) + 1)),
        special=frozenset({i for i, token in added if token.special} | {cls, mask}),
        cls=cls,
        mask=mask,
        sep=_known(tokenizer, SEPARATORS),
        unknown=_known(tokenizer, ("[UNK]", "<unk>")),
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, vocabulary


def _known(tokenizer: Any, spellings: tuple[str, ...]) -> int | None:
    """The id of the first spelling that the tokenizer has; None for none."""
    ids = (tokenizer.token_to_id(spelling) for spelling in spellings)
    return next((i for i in ids if i is not None), None)


def _needed(tokenizer: Any, path: Path, spellings: tuple[str, ...]) -> int:
    """The id of the first spelling that the tokenizer has. Raises ValueError for none."""
    found = _known(tokenizer, spellings)
    if found is None:
        raise ValueError(f"tokenizer={str(path)!r} has none of {spellings}: expected one")
    return found
