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


def no_events(root: Path, files: int, of_split: str = "") -> str:
    """Says that there is no event in the files."""
    return (
        f"meds_dir={str(root)!r} has no events{of_split} in its {files} parquet file(s): "
        "expected at least one"
    )
