"""Texts of a run: read with the tokenizer of the settings, of a checkpoint, or trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clinattn.workloads.opening import parse_data
from clinattn.workloads.seeds import is_held_out
from clinattn.workloads.source import Source
from clinattn.workloads.tables import Columns, Row
from clinattn.workloads.text import text_source
from clinattn.workloads.tokenizer import TextTokenizer, read_tokenizer
from clinattn.workloads.wordpiece import wordpiece

from .settings import TrainingSettings


def open_texts(
    settings: TrainingSettings, tokenizer: TextTokenizer | None
) -> tuple[Source, TextTokenizer | None]:
    """The source of settings.data, and its tokenizer; None for words.

    tokenizer: of the model that is gone on with. Raises ValueError for bad files, and for another
    tokenizer than the model's.
    """
    assert settings.data is not None
    if settings.tokenizer is not None:
        given = read_tokenizer(Path(settings.tokenizer))
        if tokenizer is not None and tokenizer.vocabulary.tokens != given.vocabulary.tokens:
            raise ValueError(
                f"tokenizer={str(settings.tokenizer)!r} has other tokens than the checkpoint of "
                "init"
            )
        tokenizer = tokenizer or given
    made = [] if tokenizer is None else [tokenizer]

    def trained(rows: Sequence[Row]) -> TextTokenizer:
        """Trains a tokenizer on the rows that are trained on."""
        assert settings.vocabulary is not None
        texts = [row.text for row in rows if not is_held_out(row.subject, settings.held_out)]
        made.append(wordpiece(texts, settings.vocabulary, settings.min_count))
        return made[0]

    source = text_source(
        parse_data(settings.data).place,
        trained if tokenizer is None and settings.vocabulary is not None else tokenizer,
        settings.task == "classify",
        columns=Columns(settings.text_column, settings.label_column, settings.id_column),
        labels=settings.labels,
        encoding=settings.encoding,
    )
    return source, made[0] if made else None
