"""Codes to token ids: five special tokens, then the codes by falling frequency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first tokens of every vocabulary of codes or words; their ids are 0 to 4."""
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))


@dataclass(frozen=True)
class Vocabulary:
    """tokens[i] is the code of token id i. special: the ids that are no content.

    sep, unknown: None where a tokenizer has no such token. end: of the token that a tokenizer puts
    behind every text, mostly [SEP]; None for none.
    """

    tokens: tuple[str, ...]
    special: frozenset[int] = frozenset(range(len(SPECIAL_TOKENS)))
    cls: int = CLS
    mask: int = MASK
    sep: int | None = SEP
    unknown: int | None = UNK
    end: int | None = None

    @classmethod
    def build(
        cls,
        codes: Sequence[str],
        counts: np.ndarray,
        min_count: int = 1,
        max_size: int | None = None,
    ) -> Vocabulary:
        """The codes seen at least min_count times, most frequent first, ties by code.

        max_size counts the special tokens too; None is no limit.
        """
        if max_size is not None and max_size <= len(SPECIAL_TOKENS):
            raise ValueError(
                f"max_size={max_size}: expected more than the {len(SPECIAL_TOKENS)} special tokens"
            )
        ranked = sorted(
            (-int(count), code)
            for code, count in zip(codes, counts, strict=True)
            if count >= min_count and code not in SPECIAL_TOKENS
        )
        kept = tuple(code for _, code in ranked)
        return cls((SPECIAL_TOKENS + kept)[:max_size])

    def __len__(self) -> int:
        return len(self.tokens)

    def ordinary(self) -> np.ndarray:
        """(V,) bool: the ids that are content."""
        kept = np.ones(len(self.tokens), dtype=bool)
        kept[sorted(self.special)] = False
        return kept

    def ids(self, codes: Sequence[str]) -> np.ndarray:
        """int32 token ids; [UNK] for a code that is not in the vocabulary."""
        index = self._index
        return np.array([index.get(code, UNK) for code in codes], dtype=np.int32)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}
