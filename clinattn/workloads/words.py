"""Words and signs of a text: runs of letters and digits, and Chinese and Japanese by character."""

from __future__ import annotations

import re
from collections.abc import Iterator
from unicodedata import normalize

# Ideographs and kana, which no spaces divide into words. Hangul has spaces.
BY_CHARACTER = (
    "\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af"
)
WORD = re.compile(rf"[{BY_CHARACTER}]|[^\W{BY_CHARACTER}]+|[^\w\s]")
# Full-width letters, digits, signs and space, and half-width kana, as they are elsewhere
WIDTHS = {code: normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF00, 0xFFF0))}


def folded(text: str) -> str:
    """The text in one width and in lower case, of which lower_words are parts."""
    return text.translate(WIDTHS).lower()


def lower_words(text: str) -> Iterator[re.Match[str]]:
    """Yields the words and signs of a text; their places are those in folded(text)."""
    return WORD.finditer(folded(text))


def origins(text: str) -> list[int]:
    """For each character of folded(text), the place in `text` of the character it comes from."""
    # a character may become two, such as a capital I with a dot
    return [i for i, character in enumerate(text) for _ in folded(character)]
