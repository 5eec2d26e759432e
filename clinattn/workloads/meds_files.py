"""Files of a MEDS folder, read with errors that name the folder, the file and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa

LAYOUT = "a MEDS folder: data/**/*.parquet with columns subject_id, time, code"


class MedsError(ValueError):
    """A MEDS folder that cannot be used; the message names it, what it holds and what it should."""


def parquet_files(root: Path) -> list[Path]:
    """Returns the files of events in order. Raises MedsError where there is none."""
    if not root.exists():
        raise MedsError(f"meds_dir={str(root)!r} does not exist: expected {LAYOUT}")
    if not root.is_dir():
        raise MedsError(f"meds_dir={str(root)!r} is a file: expected {LAYOUT}")
    paths = sorted((root / "data").rglob("*.parquet"))
    if not paths:
        found = sorted(path.name for path in root.iterdir())[:8]
        raise MedsError(
            f"meds_dir={str(root)!r} has no data/**/*.parquet (it holds {found}): expected {LAYOUT}"
        )
    return paths


def read_columns(root: Path, path: Path, required: list[str], optional: list[str]) -> pa.Table:
    """Returns columns of a file in the folder `root`, all required and the optional that it has.

    Raises MedsError for a file that cannot be read or lacks a required column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"meds_dir={str(root)!r}: {path.relative_to(root)}"
    try:
        names = pq.read_schema(path).names
        missing = [name for name in required if name not in names]
        if missing:
            raise MedsError(
                f"{where} has no column {missing} (it has {names}): expected {required}"
            )
        return pq.read_table(
            path, columns=required + [name for name in optional if name in names], partitioning=None
        )
    except (pa.ArrowException, OSError) as error:
        raise MedsError(f"{where} cannot be read ({error}): expected a parquet file") from error
