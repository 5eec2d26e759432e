"""Meanings of the codes of a MEDS folder or store, by metadata/codes.parquet of the folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .meds_files import MedsError, read_columns
from .store.format import is_store
from .store.reading import store_descriptions


def code_descriptions(meds_dir: str | Path) -> dict[str, str]:
    """Returns meanings of codes by metadata/codes.parquet of a MEDS folder; {} without it.

    A store has the meanings that its folder had.

    A code without a description has "under ..." with the descriptions of its parent_codes, or with
    a parent itself where the file does not describe it, as is so for parents in OMOP's
    vocabularies. Raises MedsError where the file cannot be read or has other types.
    """
    root = Path(meds_dir)
    if is_store(root):
        return store_descriptions(root)
    path = root / "metadata" / "codes.parquet"
    if not path.exists():
        return {}
    table = read_columns(root, path, ["code"], ["description", "parent_codes"])
    codes = table["code"].to_pylist()
    columns = {name: table[name].to_pylist() for name in table.column_names}
    nothing = [None] * len(codes)
    described = {
        str(code): text
        for code, found in zip(codes, columns.get("description", nothing), strict=True)
        if (text := _one_line(found))
    }
    meanings = dict(described)
    for code, parents in zip(codes, columns.get("parent_codes", nothing), strict=True):
        if parents is not None and not isinstance(parents, list):
            kind = table.schema.field("parent_codes").type
            raise MedsError(
                f"meds_dir={str(root)!r}: metadata/codes.parquet column 'parent_codes' has type "
                f"{kind}: expected a list of strings"
            )
        above = [described.get(str(x), _one_line(x)) for x in parents or () if x]
        if str(code) not in described and above:
            meanings[str(code)] = f"under {'; '.join(above)}"
    return meanings


def with_meaning(pattern: str, codes: Iterable[str], meanings: Mapping[str, str]) -> str:
    """Returns a pattern of codes, with the meaning of the code where it matches one alone."""
    matching = [code for code in codes if fnmatchcase(code, pattern)]
    if len(matching) != 1 or matching[0] not in meanings:
        return pattern
    return f"{pattern} ({meanings[matching[0]]})"


def _one_line(text: Any) -> str:
    return "" if text is None else " ".join(str(text).split())
