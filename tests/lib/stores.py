"""MEDS folders of every kind, made from one list of events, and stores that are cut finely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clinattn.workloads.meds import meds_source
from clinattn.workloads.source import Source
from clinattn.workloads.store import plan, prepare, scan
from clinattn.workloads.store.reading import store_source

DAY = 86_400_000_000  # microseconds
PATIENTS = 23


def events(seed: int = 0, patients: int = PATIENTS) -> pa.Table:
    """Events by subject and time: facts without a time, a birth for some, equal times, values."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in np.sort(rng.choice(10 * patients, patients, replace=False) - patients).tolist():
        rows += [(patient, None, f"SEX//{'FM'[patient % 2]}", None)] * (patient % 3)
        time = int(rng.integers(-9_000, 9_000)) * DAY
        if patient % 2:
            rows.append((patient, time, "MEDS_BIRTH", None))
        for _ in range(int(rng.integers(0, 40)) + (patient % 3 == 0)):
            time += int(rng.integers(0, 3)) * DAY
            value = float(np.float32(rng.normal())) if rng.random() < 0.5 else None
            rows.append((patient, time, f"CODE//{int(rng.integers(0, 12)) ** 2:03d}", value))
    subject, time, code, value = zip(*rows, strict=True)
    return pa.table(
        {
            "subject_id": pa.array(subject, pa.int64()),
            "time": pa.array(time, pa.timestamp("us")),
            "code": pa.array(code, pa.string()),
            "numeric_value": pa.array(value, pa.float32()),
        }
    )


def write(root: Path, files: dict[str, pa.Table], **known) -> Path:
    """Writes tables to root/data. known: of pyarrow.parquet.write_table."""
    for name, table in files.items():
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **known)
    return root


def shuffled(table: pa.Table, seed: int = 1) -> pa.Table:
    return table.take(np.random.default_rng(seed).permutation(len(table)))


def with_column(table: pa.Table, name: str, column) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def recast(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    return with_column(table, name, table[name].cast(kind))


def write_as(root: Path, table: pa.Table, name: str, kind: pa.DataType) -> Path:
    return write(root, {"0.parquet": recast(table, name, kind)})


def thirds(table: pa.Table) -> dict[str, pa.Table]:
    """Three files, of which each shares a subject with the next."""
    size = len(table) // 3 + 1
    return {f"{i}.parquet": table.slice(i * size, size) for i in range(3)}


def apart(table: pa.Table, files: int = 5) -> dict[str, pa.Table]:
    """Files that share no subject, by the remainder of its number."""
    remainder = table["subject_id"].to_numpy() % files
    return {f"train/{i}.parquet": table.filter(remainder == i) for i in range(files)}


KINDS: dict[str, Callable[[Path, pa.Table], Path]] = {
    "one file": lambda root, t: write(root, {"0.parquet": t}),
    "files apart": lambda root, t: write(root, apart(t)),
    "subjects over several files": lambda root, t: write(root, thirds(t)),
    "unsorted": lambda root, t: write(root, {"0.parquet": shuffled(t)}),
    "unsorted over several files": lambda root, t: write(root, thirds(shuffled(t))),
    "many row groups": lambda root, t: write(root, {"0.parquet": t}, row_group_size=7),
    "unsorted in row groups": lambda root, t: write(
        root, {"0.parquet": shuffled(t)}, row_group_size=7
    ),
    "an empty file": lambda root, t: write(root, {"0.parquet": t[:0], "1.parquet": t}),
    "no values": lambda root, t: write(root, {"0.parquet": t.drop_columns("numeric_value")}),
    "values of type null": lambda root, t: write(
        root, {"0.parquet": with_column(t, "numeric_value", pa.nulls(len(t)))}
    ),
    "only static facts": lambda root, t: write(
        root, {"0.parquet": with_column(t, "time", pa.nulls(len(t)))}
    ),
    "dictionaries": lambda root, t: write(
        root, {"0.parquet": with_column(t, "code", t["code"].dictionary_encode())}
    ),
    "plain strings": lambda root, t: write(root, {"0.parquet": t}, use_dictionary=False),
    "large strings": lambda root, t: write_as(root, t, "code", pa.large_string()),
    "nanoseconds": lambda root, t: write_as(root, t, "time", pa.timestamp("ns")),
    "a time zone": lambda root, t: write_as(root, t, "time", pa.timestamp("us", "UTC")),
    "dates": lambda root, t: write_as(root, t, "time", pa.date32()),
    "small subjects": lambda root, t: write_as(root, t, "subject_id", pa.int16()),
    "double values": lambda root, t: write_as(root, t, "numeric_value", pa.float64()),
    "folders that are splits": lambda root, t: write(
        root,
        {
            f"{split}/0.parquet": t.filter(t["subject_id"].to_numpy() % 3 == i)
            for i, split in enumerate(("train", "tuning", "held_out"))
        },
    ),
}


@contextmanager
def cut_finely(events: int = 50, rows: int = 60):
    """Pieces of a store have at most so many events, and scans so many rows, of this process."""
    before = plan.EVENTS, scan.ROWS
    plan.EVENTS, scan.ROWS = events, rows
    try:
        yield
    finally:
        plan.EVENTS, scan.ROWS = before


def made(root: Path, output: Path, events: int = 50, processes: int = 1, **known) -> Path:
    """A store of a folder, in pieces of at most so many events."""
    with cut_finely(events):
        prepare.prepare(root, output, processes, **known)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a store, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def assert_same_sequences(store: Source, memory: Source) -> None:
    """Checks that two sources differ in where their events lie, and in nothing else."""
    for name in ("name", "title", "unit", "vocabulary", "splits_digest"):
        assert getattr(store, name) == getattr(memory, name), name
    for name in ("subjects", "origins"):
        np.testing.assert_array_equal(getattr(store, name), getattr(memory, name), name)
    assert listed(store.splits) == listed(memory.splits)
    np.testing.assert_array_equal(store.held_out(0.3), memory.held_out(0.3))
    for index in range(len(memory)):
        (a, timed_a, b), (c, timed_c, d) = store.bounds(index), memory.bounds(index)
        assert (timed_a - a, b - a) == (timed_c - c, d - c)
        for name in ("ids", "times", "values"):
            one, other = getattr(store, name)[a:b], getattr(memory, name)[c:d]
            assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), (name, index)


def listed(splits: Sequence[str | None] | None) -> list[str | None] | None:
    return None if splits is None else list(splits)


def assert_store_of(folder: Path, root: Path) -> Source:
    """Checks that a store holds what its MEDS folder holds, and returns it."""
    store = store_source(folder)
    assert_same_sequences(store, meds_source(root))
    return store
