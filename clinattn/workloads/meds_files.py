"""Files of a MEDS folder, read with errors that name the folder, the file and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa

SCHEMAS = Path("tokenization") / "schemas"  # of cohorts of meds-torch-data
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


def read_columns(
    root: Path, path: Path, required: list[str], optional: list[str], name: str = "meds_dir"
) -> pa.Table:
    """Returns columns of a file in `root` or at it, all required and the optional that it has.

    name: of the argument that root was, for messages.
    Raises MedsError for a file that cannot be read or lacks a required column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = place(root, path, name)
    try:
        names = pq.read_schema(path).names
        missing = [column for column in required if column not in names]
        if missing:
            raise MedsError(
                f"{where} has no column {missing} (it has {names}): expected {required}"
            )
        columns = required + [column for column in optional if column in names]
        return pq.read_table(path, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise MedsError(f"{where} cannot be read ({error}): expected a parquet file") from error


def place(root: Path, path: Path, name: str = "meds_dir") -> str:
    """A file in the folder `root`, or root itself, as messages call it."""
    said = f"{name}={str(root)!r}"
    return said if path == root else f"{said}: {path.relative_to(root)}"


def has_time_zone(root: Path) -> bool:
    """Returns whether times of events have a time zone, in a MEDS folder or a cohort.

    Raises MedsError where files differ.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = {}
    schemas = sorted((root / SCHEMAS).rglob("*.parquet"))
    for path in schemas or parquet_files(root):
        try:
            kind = pq.read_schema(path).field("time").type
            kind = kind.value_type if schemas else kind
        except (pa.ArrowException, OSError, KeyError) as error:
            raise MedsError(f"{place(root, path)} has no readable column 'time'") from error
        if not pa.types.is_null(kind):
            found[getattr(kind, "tz", None) is not None] = path
    if len(found) == 2:
        raise MedsError(
            f"{place(root, found[True])} has times with a time zone, and {found[False].name} "
            "without: expected one way"
        )
    return True in found
