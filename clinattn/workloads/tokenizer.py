"""Tokenizers of the package tokenizers: of a file, or of a model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinattn.files.disk import parse_json

from .vocabulary import Vocabulary

SEPARATORS = ("[SEP]", "</s>")  # spellings of [SEP] in tokenizers
FILES = "tokenizer.json, vocab.txt, or vocab.json with merges.txt"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that neither cuts nor pads, and its vocabulary, whose `end` is of its template.

    tokenizer: a Tokenizer of the package tokenizers.
    """

    tokenizer: Any
    vocabulary: Vocabulary

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens around it."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def json(self) -> str:
        """The contents of a tokenizer.json; of_json makes the same tokenizer of it."""
        return str(self.tokenizer.to_str())


def read_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a tokenizer.json, or of a folder of transformers.

    Raises ValueError for what is none, or has no [CLS] or no [MASK].
    """
    where = f"tokenizer={str(path)!r}"
    package(where)
    try:
        if path.is_dir():
            return checked(_of_folder(path, where), where)
        return of_json(path.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None


def of_json(content: str, where: str) -> TextTokenizer:
    """The tokenizer of the contents of a tokenizer.json. where: the input, for messages."""
    tokenizers = package(where)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{where} cannot be read: {error}") from None
    return checked(tokenizer, where)


def package(where: str) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError(f"{where} needs: pip install tokenizers") from None
    return tokenizers


def _of_folder(folder: Path, where: str) -> Any:
    tokenizers = package(where)
    try:
        if (folder / "tokenizer.json").is_file():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.txt").is_file():
            return _bert(folder, tokenizers)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return _roberta(folder, tokenizers)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{where} cannot be read: {error}") from None
    raise ValueError(f"{where} has no tokenizer: expected {FILES}")


def _bert(folder: Path, tokenizers: Any) -> Any:
    """BERT's WordPiece of vocab.txt, with the words of tokenizer_config.json.

    A vocabulary with capital letters was made of text with these, where no word says otherwise.
    """
    said = {name: value for name, value in _settings(folder).items() if value is not None}
    path = folder / "vocab.txt"
    names = path.read_text(encoding="utf-8").splitlines()
    cased = any(name != name.lower() for name in names if not name.startswith("["))
    made = tokenizers.implementations.BertWordPieceTokenizer(
        str(path),
        lowercase=said.get("do_lower_case", not cased),
        strip_accents=said.get("strip_accents"),
        handle_chinese_chars=said.get("tokenize_chinese_chars", True),
    )
    return tokenizers.Tokenizer.from_str(made.to_str())


def _roberta(folder: Path, tokenizers: Any) -> Any:
    """RoBERTa's byte-level BPE of vocab.json and merges.txt."""
    spaced = _settings(folder).get("add_prefix_space", False)
    made = tokenizers.implementations.ByteLevelBPETokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), add_prefix_space=spaced
    )
    tokenizer = tokenizers.Tokenizer.from_str(made.to_str())
    names = [x for x in ("<s>", "</s>", "<pad>", "<unk>") if tokenizer.token_to_id(x) is not None]
    tokenizer.add_special_tokens([*names, tokenizers.AddedToken("<mask>", lstrip=True)])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        *ends, trim_offsets=True, add_prefix_space=spaced
    )
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return found


def checked(tokenizer: Any, where: str) -> TextTokenizer:
    """Raises ValueError for a tokenizer without [CLS] or [MASK], or with another template."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = {i: name for name, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder().items()
    cls, end = _template(tokenizer, where)
    mask = _needed(tokenizer, where, ("[MASK]", "<mask>"))
    special = {i for i, token in added if token.special} | {cls, mask}
    vocabulary = Vocabulary(
        tokens=tuple(names.get(i, f"[unused {i}]") for i in range(max(names) + 1)),
        special=frozenset(special if end is None else special | {end}),
        cls=cls,
        mask=mask,
        sep=_known(tokenizer, SEPARATORS),
        unknown=_known(tokenizer, ("[UNK]", "<unk>")),
        end=end,
    )
    return TextTokenizer(tokenizer, vocabulary)


def _template(tokenizer: Any, where: str) -> tuple[int, int | None]:
    """Ids of the special tokens before and after a text; without a template there is [CLS] alone.

    Raises ValueError for another template.
    """
    around = tokenizer.encode("").ids
    if not around:
        return _needed(tokenizer, where, ("[CLS]", "<s>")), None
    first, *last = around
    text = tokenizer.encode("a").ids
    if len(last) > 1 or text[0] != first or text[len(text) - len(last) :] != last:
        names = [tokenizer.id_to_token(i) for i in around]
        raise ValueError(
            f"{where} puts {names} around a text: expected one token before it, such as [CLS], and "
            "at most one behind it, such as [SEP]"
        )
    return first, last[0] if last else None


def _known(tokenizer: Any, spellings: tuple[str, ...]) -> int | None:
    """The id of the first spelling that the tokenizer has; None for none."""
    ids = (tokenizer.token_to_id(spelling) for spelling in spellings)
    return next((i for i in ids if i is not None), None)


def _needed(tokenizer: Any, where: str, spellings: tuple[str, ...]) -> int:
    """The id of the first spelling that the tokenizer has. Raises ValueError for none."""
    found = _known(tokenizer, spellings)
    if found is None:
        raise ValueError(f"{where} has none of {spellings}: expected one")
    return found
