"""A WordPiece tokenizer trained on texts, by the trainer of the package tokenizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from .tokenizer import TextTokenizer, checked, package
from .vocabulary import SPECIAL_TOKENS


def wordpiece(texts: Iterable[str], size: int, min_count: int) -> TextTokenizer:
    """A tokenizer of at most `size` tokens; the same texts give the same one, wherever it is made.

    Widths and cases are folded, Chinese characters stand alone, and a sequence is [CLS] text [SEP],
    as in BERT. A word with a character seen less than min_count times is no part of the training.
    Raises ValueError where the characters alone are more.
    """
    tokenizers = package(f"vocabulary={size}")
    tokenizer = _empty(tokenizers, {})
    counts = Counter(word for text in texts for word in _words(tokenizer, text))
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        characters.update({piece: count for piece in pieces(word)})
    words = {w: n for w, n in counts.items() if all(characters[x] >= min_count for x in pieces(w))}
    alphabet = sorted({piece for word in words for piece in pieces(word)})
    if len(SPECIAL_TOKENS) + len(alphabet) > size:
        raise ValueError(
            f"vocabulary={size}: expected at least {len(SPECIAL_TOKENS) + len(alphabet):,}, for "
            "the characters at the start and inside of words"
        )
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_count,
        # given so, characters have the same ids in each run, and ids settle ties between pairs
        special_tokens=[*SPECIAL_TOKENS, *alphabet],
        show_progress=False,
    )
    repeated = (word for word in sorted(words) for word in repeat(word, words[word]))
    tokenizer.train_from_iterator(repeated, trainer)
    # another one, in which characters are no special tokens
    return checked(_empty(tokenizers, tokenizer.get_vocab()), f"vocabulary={size}")


def pieces(word: str) -> list[str]:
    """The characters of a word as WordPiece writes them."""
    return [word[0], *(f"##{character}" for character in word[1:])]


def _words(tokenizer: Any, text: str) -> Iterator[str]:
    plain = tokenizer.normalizer.normalize_str(text)
    return (word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain))


def _empty(tokenizers: Any, vocabulary: dict[str, int]) -> Any:
    """A tokenizer of this vocabulary, or one to be trained."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFKC(),
            tokenizers.normalizers.BertNormalizer(strip_accents=False, lowercase=True),
        ]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    if vocabulary:
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
        )
    return tokenizer
