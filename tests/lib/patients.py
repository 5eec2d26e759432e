"""MEDS folders of made-up patients whose timelines follow a rule that an encoder can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CYCLE = 12
DAY = 86_400_000_000  # microseconds


def write_events(root: Path, rows: list[tuple]) -> Path:
    """rows: (subject_id, microseconds or None, code) or, all of them, with a value or None."""
    subject, time, code, *value = zip(*rows, strict=True)
    (root / "data").mkdir(parents=True, exist_ok=True)
    table = {
        "subject_id": pa.array(subject, pa.int64()),
        "time": pa.array(time, pa.timestamp("us")),
        "code": pa.array(code, pa.string()),
    }
    if value:
        table["numeric_value"] = pa.array(value[0], pa.float32())
    pq.write_table(pa.table(table), root / "data" / "0.parquet")
    return root


def write_patients(root: Path, patients: int = 40, seed: int = 0) -> Path:
    """Each walks round a cycle of codes, and ALARM comes in the second half after a WARNING.

    A token follows from its neighbours, though all codes of the cycle are as frequent.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int | None, str]] = []
    for patient in range(1, patients + 1):
        half = int(rng.integers(8, 30))
        phase = int(rng.integers(CYCLE))
        codes = [f"STEP//{(phase + i) % CYCLE}" for i in range(2 * half)]
        if rng.random() < 0.5:
            codes[half // 2] = "WARNING"
            codes[half + half // 2] = "ALARM//RED"
        rows.append((patient, None, f"SEX//{'FM'[patient % 2]}"))
        rows += [(patient, i, code) for i, code in enumerate(codes)]
    return write_events(root, rows)


def write_measured_patients(root: Path, patients: int = 40, seed: int = 0) -> Path:
    """The same walks, an event every other day from some age on, half of them with a value.

    ALARM ends half of the timelines.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple] = []
    for patient in range(1, patients + 1):
        birth, age = (int(x) for x in rng.integers(-20_000, 20_000, 2))
        phase = int(rng.integers(CYCLE))
        rows.append((patient, None, f"SEX//{'FM'[patient % 2]}", None))
        rows.append((patient, birth * DAY, "MEDS_BIRTH", None))
        first, steps = birth + abs(age), int(rng.integers(16, 60))
        for i in range(steps):
            step = (phase + i) % CYCLE
            value = float(100 * step + rng.normal()) if step % 2 else None
            rows.append((patient, (first + 2 * i) * DAY, f"STEP//{step}", value))
        if rng.random() < 0.5:
            rows.append((patient, (first + 2 * steps) * DAY, "ALARM", None))
    return write_events(root, rows)


def write_splits(root: Path, of: dict[int, str], **columns) -> Path:
    """The owner's list: the split of each subject. columns: in place of those of the list."""
    (root / "metadata").mkdir(exist_ok=True)
    table = {"subject_id": list(of), "split": list(of.values())} | columns
    pq.write_table(pa.table(table), root / "metadata" / "subject_splits.parquet")
    return root


def write_labels(path: Path, rows: list[tuple], column: str = "boolean_value", **columns) -> Path:
    """rows: (subject_id, microseconds, value). columns: in place of those of the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subject, time, value = zip(*rows, strict=True)
    times = pa.array(time, pa.timestamp("us"))
    table = {"subject_id": pa.array(subject, pa.int64()), "prediction_time": times}
    pq.write_table(pa.table(table | {column: list(value)} | columns), path)
    return path
