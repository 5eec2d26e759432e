"""The rows of a file of texts as a source, by words or by a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .source import Source
from .tables import COLUMNS, Columns, Row, Rows, read_rows
from .tokenizer import TextTokenizer, read_tokenizer
from .vocabulary import Vocabulary
from .words import lower_words

# A tokenizer, where it is, or what makes one of the rows; None takes words
Tokenizing = TextTokenizer | str | Path | Callable[[Sequence[Row]], TextTokenizer] | None


def text_source(
    text_file: str | Path,
    tokenizer: Tokenizing = None,
    labelled: bool = False,
    *,
    columns: Columns = COLUMNS,
    labels: str | Path | None = None,
    encoding: str | None = None,
) -> Source:
    """The rows of a file. Their subject is the column subject_id, or the text where it is absent.

    tokenizer: None takes lower-cased words and signs. The others are those of read_rows.
    Raises ValueError for a file that cannot be used.
    """
    path = Path(text_file)
    beside = None if labels is None else Path(labels)
    found = read_rows(path, labelled, columns=columns, labels=beside, encoding=encoding)
    return source_of_rows(path, found, tokenizer)


def source_of_rows(path: Path, found: Rows, tokenizer: Tokenizing = None) -> Source:
    """The rows that read_rows has found in a file; arguments and errors as those of text_source."""
    rows, used = found
    texts = [row.text for row in rows]
    if callable(tokenizer):
        tokenizer = tokenizer(rows)
    elif isinstance(tokenizer, (str, Path)):
        tokenizer = read_tokenizer(Path(tokenizer))
    if tokenizer is None:
        ids, vocabulary = _by_words(texts)
    else:
        ids, vocabulary = tokenizer.ids(texts), tokenizer.vocabulary
    if not any(ids):
        raise ValueError(f"text_file={str(path)!r} has no words in its rows: expected some")
    offsets = np.r_[0, np.cumsum([len(row) for row in ids])].astype(np.int64)
    return Source(
        name="text",
        title=path.name if used.startswith("utf-8") else f"{path.name} in {used.upper()}",
        unit="rows",
        where=f"text_file={str(path)!r}",
        subjects=[row.subject for row in rows],
        begins=offsets[:-1],
        starts=offsets[:-1],
        ends=offsets[1:],
        ids=np.array([i for row in ids for i in row], dtype=np.int64),
        vocabulary=vocabulary,
        closed=tokenizer is not None,
        labels=[row.label for row in rows],
    )


def _by_words(texts: list[str]) -> tuple[list[list[int]], Vocabulary]:
    """The words of each text as ids, and the vocabulary of all of them."""
    words = [[found[0] for found in lower_words(text)] for text in texts]
    counts = Counter(word for row in words for word in row)
    vocabulary = Vocabulary.build(list(counts), np.array(list(counts.values())))
    index = {token: i for i, token in enumerate(vocabulary.tokens)}
    return [[index[word] for word in row] for row in words], vocabulary
