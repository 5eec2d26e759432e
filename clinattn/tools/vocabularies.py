"""The tokenizer or the words by which a checkpoint reads texts, as its training read them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from clinattn.training.start import of_checkpoint, tokenizer_of
from clinattn.workloads import SPECIAL_TOKENS, Vocabulary
from clinattn.workloads.tokenizer import TextTokenizer, read_tokenizer

WORDS = re.compile(r"\w+|[^\w\s]")  # of older checkpoints too, whose words may be Chinese texts


def require_words(vocabulary: Vocabulary, checkpoint: str) -> None:
    """Raises ValueError for the vocabulary of a tokenizer, where none was given."""
    others = (x for x in vocabulary.tokens[len(SPECIAL_TOKENS) :] if not WORDS.fullmatch(x))
    if (other := next(others, None)) is not None:
        raise ValueError(
            f"tokenizer: got none, and checkpoint {checkpoint!r} knows {other!r}, which "
            "is no word: expected the tokenizer.json that it was trained with"
        )


def tokenizer_for(saved: dict[str, Any], given: Path | None) -> TextTokenizer | None:
    """The tokenizer of the checkpoint, or the one given with an older one; None for words.

    Checkpoints older than their tokenizers were trained without a token behind a text.
    Raises ValueError for a tokenizer with other tokens than the checkpoint.
    """
    own = tokenizer_of(saved)
    if given is None:
        return own
    found = read_tokenizer(given)
    if found.vocabulary.tokens != of_checkpoint(saved)[1].tokens:
        raise ValueError(
            f"tokenizer={str(given)!r} has other tokens than the checkpoint: expected "
            "that of its training"
        )
    return own or replace(found, vocabulary=replace(found.vocabulary, end=None))
