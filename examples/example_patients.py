"""Made-up patients in a MEDS folder, for examples without data. Alone: example_patients.py FOLDER.

Each is given heparin. Where platelets fall after it, THROMBOSIS follows in nine of ten patients;
where they fell before, or do not fall at all, in one of ten.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def given(patients: int, fell_before: bool = True) -> Iterator[tuple[str, str]]:
    """The MEDS folder and the code to predict of the command line; without them, made-up ones."""
    with TemporaryDirectory() as folder:
        if not sys.argv[1:]:
            write(folder, patients, fell_before)
        yield tuple(sys.argv[1:]) or (folder, "THROMBOSIS")


def write(folder: str | Path, patients: int = 600, fell_before: bool = True) -> None:
    """Writes 24 to 63 events of each patient, an hour to two days apart.

    fell_before: platelets fell in each patient, so that the order of two codes decides.
    """
    draw = np.random.default_rng(0)
    rows = []
    for patient in range(patients):
        half = int(draw.integers(12, 32))
        codes = [f"LAB//{number}" for number in draw.integers(20, size=2 * half)]
        first, second = sorted(draw.choice(half, 2, replace=False))
        falls_after = draw.random() < 0.5
        codes[first] = codes[second] = "DRUG//HEPARIN"
        if falls_after or fell_before:
            codes[second if falls_after else first] = "LAB//PLATELETS//LOW"
        if (draw.random() < 0.9) == falls_after:
            codes.append("THROMBOSIS")
        hours = draw.uniform(1, 48, len(codes)).cumsum()
        times = [datetime(2020, 1, 1) + timedelta(hours=hour) for hour in hours]
        rows += [(patient, *event) for event in zip(times, codes, strict=True)]
    subject, time, code = zip(*rows, strict=True)
    table = {"subject_id": subject, "time": time, "code": code}
    table["numeric_value"] = pa.nulls(len(rows), pa.float32())
    data = Path(folder) / "data"
    data.mkdir(parents=True)
    pq.write_table(pa.table(table), data / "patients.parquet")


if __name__ == "__main__":
    write(sys.argv[1])
