"""Opens a store: a Source whose columns are mapped files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..meds_files import MedsError, place
from ..pieces import Pieces
from ..source import Source
from ..splits import named
from ..vocabulary import Vocabulary
from .batches import values_of
from .format import CODES, PATIENTS, about, events_file
from .mapped import MappedFiles

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa

EVENTS = {"id": "int32", "time": "timestamp[us]", "value": "float"}
OF_PATIENTS = {
    "subject_id": "int64",
    "piece": "int32",
    "begin": "int64",
    "start": "int64",
    "end": "int64",
    "origin": "timestamp[us]",
    "hash": "uint64",
    "split": "dictionary<values=string, indices=int32, ordered=0>",
    "digest": "uint64",
}
OF_CODES = {"code": "string", "count": "int64", "description": "string"}


def store_source(folder: str | Path, where: str | None = None) -> Source:
    """Every patient of a store. where: the input, for messages, in place of the folder.

    Raises MedsError for a store of another format, or of which a file is missing or damaged.
    """
    root = Path(folder)
    said = about(root)
    files = MappedFiles(root)

    def opened(name: str, columns: dict[str, str], rows: int | None = None) -> pa.RecordBatch:
        batch = files.open(name, said["files"].get(name, -1))
        found = {field.name: str(field.type) for field in batch.schema}
        if found != columns or rows not in (None, len(batch)):
            raise MedsError(
                f"{place(root, root / name)} has {len(batch)} rows of {found}: expected "
                f"{rows} of {columns}"
            )
        return batch

    sizes = said["events"]
    pieces = [opened(events_file(i), EVENTS, rows) for i, rows in enumerate(sizes)]
    patients = opened(PATIENTS, OF_PATIENTS, said["patients"])
    tokens = opened(CODES, OF_CODES)["code"].to_pylist()

    def events(name: str, kind: Any) -> Pieces:
        return Pieces([values_of(batch[name], kind) for batch in pieces], touched=files.touched)

    splits = said["splits"]
    return Source(
        name="meds",
        title=said["title"],
        unit="patients",
        where=where or f"meds_dir={str(folder)!r}",
        subjects=values_of(patients["subject_id"], np.int64),
        begins=values_of(patients["begin"], np.int64),
        starts=values_of(patients["start"], np.int64),
        ends=values_of(patients["end"], np.int64),
        ids=events("id", np.int32),
        vocabulary=Vocabulary(tuple(tokens)),
        times=events("time", np.int64),
        values=events("value", np.float32),
        origins=values_of(patients["origin"], np.int64),
        splits=None if splits is None else _splits(patients["split"]),
        splits_digest="" if splits is None else splits["digest"],
        draws=values_of(patients["hash"], np.uint64),
    )


def store_descriptions(folder: Path) -> dict[str, str]:
    """Meanings of the codes of a store, of those that have one. Raises MedsError as above."""
    codes = MappedFiles(folder).open(CODES, about(folder)["files"].get(CODES, -1))
    pairs = zip(codes["code"].to_pylist(), codes["description"].to_pylist(), strict=True)
    return {code: text for code, text in pairs if text is not None}


def _splits(column: pa.DictionaryArray) -> list[str | None]:
    numbers = column.indices.fill_null(-1).to_numpy()
    return named(numbers, column.dictionary.to_pylist())
