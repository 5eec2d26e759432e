"""Arrow files of one record batch: columns of numpy arrays, written whole and read as they lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinattn.files.disk import written_whole

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa


def write_batch(path: Path, columns: dict[str, pa.Array]) -> None:
    """Writes a file for its owner alone, whole or not at all."""
    import pyarrow as pa

    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with written_whole(path, private=True) as partial, partial.open("wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)


def read_batch(source: Path | pa.Buffer) -> pa.RecordBatch:
    """Returns the batch of a file, or of a buffer over one, without a copy then.

    Raises OSError or pyarrow's errors for what is no such file.
    """
    import pyarrow as pa

    found = pa.py_buffer(source.read_bytes()) if isinstance(source, Path) else source
    return pa.ipc.open_file(found).get_batch(0)


def column(values: np.ndarray, kind: pa.DataType, absent: np.ndarray | None = None) -> pa.Array:
    """An array over values (n,), null where absent (n,) bool; the values under nulls stay."""
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    nulls = 0 if absent is None else int(np.count_nonzero(absent))
    valid = None
    if absent is not None and nulls:
        valid = pa.py_buffer(np.packbits(~absent, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(values)], nulls)


def values_of(array: pa.Array, kind: Any) -> np.ndarray:
    """The values of an array, under its nulls too, without a copy: (n,)."""
    data = array.buffers()[1]
    if data is None:
        return np.zeros(0, dtype=kind)
    offset = array.offset * np.dtype(kind).itemsize
    return np.frombuffer(data, dtype=kind, count=len(array), offset=offset)
