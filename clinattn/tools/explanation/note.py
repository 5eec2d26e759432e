"""A note as words with places in its text, by words or by a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clinattn.tools.explanation.case import Case, Unit, shown
from clinattn.tools.explanation.settings import ExplainSettings
from clinattn.tools.vocabularies import require_words
from clinattn.workloads import Vocabulary
from clinattn.workloads.encodings import decoded
from clinattn.workloads.tables import ENDINGS
from clinattn.workloads.tokenizer import TextTokenizer
from clinattn.workloads.words import lower_words, origins


class Words(NamedTuple):
    """Ids of the tokens, the word of each, the place of each word, and whether it is known."""

    ids: list[int]
    of_token: list[int]
    spans: list[tuple[int, int]]
    known: list[bool]

    def units(self, text: str, tokens: int) -> list[Unit]:
        """The words of the first so many tokens."""
        count = 1 + max(self.of_token[:tokens])
        pairs = zip(self.spans[:count], self.known, strict=False)
        return [Unit(shown(text[slice(*span)]), known=known, span=span) for span, known in pairs]


def note_case(
    model: Any,
    settings: ExplainSettings,
    text: str,
    units: list[Unit],
    of_token: Tensor,
    words: int,
    facts: dict[str, str],
) -> Case:
    """The case of a note of so many words, of which the model reads the units."""
    assert settings.text is not None
    warnings = []
    if len(units) < words:
        warnings.append(
            f"The model reads the first {len(units):,} of {words:,} words; what is behind them has "
            "no part in the prediction."
        )
    facts |= {"note": str(settings.text), "words read": f"{len(units):,} of {words:,}"}
    return Case(
        model=model,
        title=f"note {settings.text.name}",
        unit="word",
        units=units,
        of_token=of_token,
        text=text,
        read=units[-1].span[1],
        facts=facts,
        warnings=warnings,
    )


def read_note(path: Path, encoding: str | None = None) -> str:
    """The text of a file. Raises ValueError for one that is empty, a table, or no text."""
    where = f"text={str(path)!r}"
    if path.suffix in ENDINGS:
        raise ValueError(f"{where} is a table: expected a file with the text of one note")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None
    text = decoded(content, encoding, where).text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{where} is empty: expected the text of a note")
    return text


def by_words(text: str, vocabulary: Vocabulary, settings: ExplainSettings) -> Words:
    """Raises ValueError for the vocabulary of a tokenizer."""
    require_words(vocabulary, settings.checkpoint)
    origin = origins(text)
    found = list(lower_words(text))
    if not found:
        raise ValueError(f"text={str(settings.text)!r} has no words: expected some")
    ids = vocabulary.ids([match[0] for match in found]).tolist()
    of_token: list[int] = []
    spans: list[tuple[int, int]] = []
    for match in found:
        start, end = origin[match.start()], origin[match.end() - 1] + 1
        if spans and start < spans[-1][1]:  # of one character with the token before it
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
        of_token.append(len(spans) - 1)
    return Words(ids, of_token, spans, known_words(ids, of_token, vocabulary.unknown))


def by_tokenizer(text: str, tokenizer: TextTokenizer, settings: ExplainSettings) -> Words:
    """The words of a tokenizer's tokens."""
    encoding = tokenizer.tokenizer.encode(text, add_special_tokens=False)
    if not encoding.ids:
        raise ValueError(f"text={str(settings.text)!r} has no words: expected some")
    words, spans = words_and_spans(text, encoding.word_ids, encoding.offsets)
    known = known_words(encoding.ids, words, tokenizer.vocabulary.unknown)
    return Words(encoding.ids, words, spans, known)


def known_words(ids: Sequence[int], of_token: Sequence[int], unknown: int | None) -> list[bool]:
    """Returns for each word whether no token of it is [UNK]."""
    unread = {word for i, word in zip(ids, of_token, strict=True) if i == unknown}
    return [word not in unread for word in range(1 + max(of_token))]


def words_and_spans(
    text: str, words: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The word of each token, counted from 0, and the place of each word, without white space.

    A token of no word is in that before it. Words do not overlap.
    """
    numbers: list[int] = []
    spans: list[list[int]] = []
    last: int | None = None
    for word, (start, end) in zip(words, offsets, strict=True):
        if not spans or (word is not None and word != last):
            spans.append([max(start, spans[-1][1] if spans else 0), end])
        last = last if word is None else word
        spans[-1][1] = max(spans[-1][1], end)
        numbers.append(len(spans) - 1)
    return numbers, [_stripped(text, *span) for span in spans]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    start += len(inner) - len(inner.lstrip())
    return start, start + len(inner.strip())
