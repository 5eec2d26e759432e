"""Checks that a text is read with the vocabulary that a checkpoint was trained with."""

from __future__ import annotations

import re
from pathlib import Path

from clinattn.workloads import SPECIAL_TOKENS, Vocabulary

WORDS = re.compile(r"\w+|[^\w\s]")  # of older checkpoints too, whose words may be Chinese texts


def require_words(vocabulary: Vocabulary, checkpoint: str) -> None:
    """Raises ValueError for the vocabulary of a tokenizer, where none was given."""
    others = (x for x in vocabulary.tokens[len(SPECIAL_TOKENS) :] if not WORDS.fullmatch(x))
    if (other := next(others, None)) is not None:
        raise ValueError(
            f"tokenizer: got none, and checkpoint {checkpoint!r} knows {other!r}, which "
            "is no word: expected the tokenizer.json that it was trained with"
        )


def require_same(own: Vocabulary, vocabulary: Vocabulary, tokenizer: Path) -> None:
    """Raises ValueError where a tokenizer's own vocabulary is not that of the checkpoint."""
    if own.tokens != vocabulary.tokens:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} has other tokens than the checkpoint: expected "
            "that of its training"
        )
