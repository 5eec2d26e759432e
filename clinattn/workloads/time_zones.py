"""The time zone of events, which times of labels have to have or to lack as well."""

from __future__ import annotations

from pathlib import Path

from .meds_files import SCHEMAS, MedsError, parquet_files, place
from .store.format import about, is_store


def has_time_zone(root: Path) -> bool:
    """Returns whether times of events have a time zone, in a MEDS folder, a store or a cohort.

    Raises MedsError where files differ.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if is_store(root):
        said = about(root)["has_time_zone"]
        if said is None:
            raise MedsError(
                f"meds_dir={str(root)!r} was made of files with times with a time zone and of "
                "files with times without: expected one way"
            )
        return said
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
