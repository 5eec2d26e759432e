"""Writes a MEDS folder of made-up patients, of any number of events, in bounded memory.

    python bench/made_timelines.py FOLDER --events 300000000

The same numbers give the same folder. Lengths of timelines are log-normal and codes follow Zipf's
law, as in records of hospitals; events come in visits, some with a value, after a birth and facts
without a time. Nothing in them is there to be learnt.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK = 1 << 20  # events that are made at once, and are a row group
MEDIAN, SIGMA = 60, 1.4  # of the log-normal law of events for a patient
CODES, EXPONENT = 20_000, 1.1  # of Zipf's law
KINDS = ("LAB", "MEDICATION", "DIAGNOSIS", "PROCEDURE")
FIXED = ("MEDS_BIRTH", "SEX//F", "SEX//M", "REGION//A", "REGION//B", "REGION//C")
SPLITS = ("train",) * 8 + ("tuning", "held_out")  # of ten files one after the other
DAY = 86_400_000_000  # microseconds
SUBJECTS = 100_000_000  # numbers that the patients of a file have to themselves
SCHEMA = pa.schema(
    {
        "subject_id": pa.int64(),
        "time": pa.timestamp("us"),
        "code": pa.dictionary(pa.int32(), pa.string()),
        "numeric_value": pa.float32(),
    }
)


def names() -> list[str]:
    """Returns the codes: the fixed ones, then those of Zipf's law, the most frequent first."""
    return [*FIXED, *(f"{KINDS[i % len(KINDS)]}//{i * 7919 % 100_000:05d}" for i in range(CODES))]


class Chunk(NamedTuple):
    """Patients (P,) and their events (E,). times: NO_TIME is not needed, as `static` tells."""

    patients: np.ndarray
    subjects: np.ndarray
    times: np.ndarray
    static: np.ndarray
    codes: np.ndarray
    values: np.ndarray


def lengths(rng: np.random.Generator, events: int) -> np.ndarray:
    """Events of patients, at least 4 each, whose sum is `events`."""
    drawn = 4 + rng.lognormal(np.log(MEDIAN), SIGMA, 16 + events // 20).astype(np.int64)
    through = np.cumsum(drawn)
    count = int(np.searchsorted(through, events)) + 1
    kept = drawn[:count]
    kept[-1] -= through[count - 1] - events
    return kept if kept[-1] >= 4 or count == 1 else np.r_[kept[:-2], kept[-2] + kept[-1]]


def chunk(rng: np.random.Generator, first: int, events: int) -> Chunk:
    """Draws patients from number `first` on: two facts, a birth, and events in visits."""
    sizes = lengths(rng, events)
    patients = first + np.cumsum(rng.integers(1, 20, len(sizes)))
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    place = np.arange(events) - np.repeat(starts, sizes)
    visit = rng.random(events) < 1 / 12
    gaps = np.where(visit, rng.exponential(60 * DAY, events), rng.integers(0, 3, events) * 3e8)
    gaps[starts + 2] = rng.uniform(-25_000 * DAY, 10_000 * DAY, len(sizes))  # the birth
    has_age = sizes > 3
    gaps[starts[has_age] + 3] = rng.uniform(0, 25_000 * DAY, int(has_age.sum()))
    static = place < 2
    gaps[static] = 0
    through = np.cumsum(gaps)
    before = through[starts] - gaps[starts]
    times = (through - np.repeat(before, sizes)).astype(np.int64)
    weights = np.cumsum(np.arange(1, CODES + 1) ** -EXPONENT)
    ranks = np.searchsorted(weights, rng.random(events) * weights[-1])
    codes = (ranks + len(FIXED)).astype(np.int32)
    codes[starts] = rng.integers(1, 3, len(sizes))
    codes[starts + 1] = rng.integers(3, 6, len(sizes))
    codes[starts + 2] = 0
    values = (ranks % 97 + rng.standard_normal(events)).astype(np.float32)
    values[(ranks % len(KINDS) != 0) | (place < 3)] = np.nan
    return Chunk(patients, np.repeat(patients, sizes), times, static, codes, values)


def chunks(seed: int, file: int, events: int) -> Iterator[Chunk]:
    """The chunks of a file, one patient after the other."""
    first = file * SUBJECTS
    for number in range(-(-events // CHUNK)):
        rng = np.random.default_rng([seed, file, number])
        found = chunk(rng, first, min(CHUNK, events - number * CHUNK))
        first = int(found.patients[-1])
        yield found


def write(root: Path, events: int, files: int, seed: int) -> int:
    """Writes the folder, and returns its number of patients. events: at least 4 a file."""
    tokens = pa.array(names())
    (root / "metadata").mkdir(parents=True)
    splits = pa.schema({"subject_id": pa.int64(), "split": pa.string()})
    patients = 0
    with pq.ParquetWriter(root / "metadata" / "subject_splits.parquet", splits) as listed:
        for file in range(files):
            split = SPLITS[file % len(SPLITS)]
            path = root / "data" / split / f"{file}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            share = (file + 1) * events // files - file * events // files
            with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
                for found in chunks(seed, file, share):
                    columns = [
                        pa.array(found.subjects),
                        pa.array(found.times, mask=found.static).cast(pa.timestamp("us")),
                        pa.DictionaryArray.from_arrays(pa.array(found.codes), tokens),
                        pa.array(found.values, from_pandas=True),
                    ]
                    writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
                    own = {"subject_id": found.patients, "split": [split] * len(found.patients)}
                    listed.write_table(pa.table(own, schema=splits))
                    patients += len(found.patients)
    pq.write_table(
        pa.table({"code": tokens[: len(FIXED)], "description": ["birth", None, None, *"ABC"]}),
        root / "metadata" / "codes.parquet",
    )
    return patients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", type=int, default=300_000_000)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    patients = write(given.folder, given.events, given.files, given.seed)
    print(f"{given.folder}: {given.events:,} events of {patients:,} patients")


if __name__ == "__main__":
    main()
