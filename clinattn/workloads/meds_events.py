"""Events of a parquet file of MEDS, checked, in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .meds_files import MedsError, place
from .source import NO_TIME

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa

REQUIRED = ["subject_id", "time", "code"]
VALUE = "numeric_value"
BATCH = 1 << 19  # rows, of which numbers and codes take some 30 MB
BUFFER = 1 << 20  # bytes of a column read at once, however large its row group is


class Events(NamedTuple):
    """Rows of a file, (E,). names: of the codes; one object for batches with the same codes."""

    subjects: np.ndarray  # (E,) int64
    times: np.ndarray  # (E,) int64, microseconds since 1970-01-01, NO_TIME for a static fact
    codes: np.ndarray  # (E,) int32, places in `names`
    values: np.ndarray  # (E,) float32, NaN without one
    names: pa.Array  # (C,) strings


class EventFile:
    """A file of events of the MEDS folder `root`, open to be read in batches.

    rows: of each of its row groups. zoned: whether its times have a time zone, None where all are
    null. Raises MedsError for a file that cannot be read, lacks a column or has other types; so do
    its batches, for nulls too.
    """

    def __init__(self, root: Path, path: Path):
        import pyarrow.parquet as pq

        self.where = place(root, path)
        with self._reading():
            known = pq.read_metadata(path)
            self.schema = known.schema.to_arrow_schema()
            self._check()
            self.file = pq.ParquetFile(
                path,
                metadata=known,
                read_dictionary=["code"],
                pre_buffer=False,
                buffer_size=BUFFER,
            )
        kind = self.schema.field("time").type
        self.zoned = None if str(kind) == "null" else getattr(kind, "tz", None) is not None
        self.rows = [known.row_group(i).num_rows for i in range(known.num_row_groups)]

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def batches(self, groups: Sequence[int]) -> Iterator[Events]:
        """The events of some of the row groups, in the order of the file."""
        if not groups:
            return
        columns = [name for name in (*REQUIRED, VALUE) if name in self.schema.names]
        read = self.file.iter_batches(BATCH, list(groups), columns, use_threads=False)
        names = None
        with self._reading():
            for batch in read:
                events = self._events(batch, names)
                names = events.names
                yield events

    def _events(self, batch: pa.RecordBatch, known: pa.Array | None) -> Events:
        import pyarrow as pa
        import pyarrow.compute as pc

        for name in ("subject_id", "code"):
            if batch[name].null_count:
                self._refuse_nulls(name)
        times = batch["time"].cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        values = np.full(len(batch), np.nan, dtype=np.float32)
        if VALUE in batch.schema.names:
            numeric = batch[VALUE].cast(pa.float32(), safe=False)
            values = pc.fill_null(numeric, float("nan")).to_numpy(zero_copy_only=False)
        code = batch["code"]
        same = known is not None and known.equals(code.dictionary)
        return Events(
            batch["subject_id"].cast(pa.int64()).to_numpy(),
            pc.fill_null(times, int(NO_TIME)).to_numpy(),
            code.indices.cast(pa.int32()).to_numpy(),
            values,
            known if same else code.dictionary,
        )

    def _check(self) -> None:
        from pyarrow import types as kinds

        names = self.schema.names
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise MedsError(
                f"{self.where} has no column {missing} (it has {names}): expected {REQUIRED}"
            )
        self._expect("subject_id", "int64", kinds.is_integer)
        self._expect("time", "timestamp[us]", kinds.is_timestamp, kinds.is_date, kinds.is_null)
        code = self.schema.field("code").type
        code = code.value_type if kinds.is_dictionary(code) else code
        if not (kinds.is_string(code) or kinds.is_large_string(code)):
            self._refuse_type("code", "string")
        if VALUE in names:
            numbers = (kinds.is_floating, kinds.is_integer, kinds.is_decimal, kinds.is_null)
            self._expect(VALUE, "float", *numbers)

    def _expect(self, name: str, expected: str, *fits) -> None:
        kind = self.schema.field(name).type
        if not any(fit(kind) for fit in fits):
            self._refuse_type(name, expected)

    def _refuse_type(self, name: str, expected: str) -> None:
        kind = self.schema.field(name).type
        raise MedsError(f"{self.where} column {name!r} has type {kind}: expected {expected}")

    def _refuse_nulls(self, name: str) -> None:
        nulls = sum(batch[name].null_count for batch in self.file.iter_batches(columns=[name]))
        raise MedsError(f"{self.where} column {name!r} has {nulls} nulls: expected none")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise MedsError(
                f"{self.where} cannot be read ({error}): expected a parquet file"
            ) from error
