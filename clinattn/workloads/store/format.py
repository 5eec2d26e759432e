"""Names in the folder of a store, and store.json, which is written last and says what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clinattn.files.disk import parse_json
from clinattn.files.shapes import COUNT, FLAG, NOTHING, TEXT, Each, Named, require

from ..meds_files import MedsError

FORMAT = 1
ABOUT, CODES, PATIENTS = "store.json", "codes.arrow", "patients.arrow"
WORK = ".work"  # what a store that is being made remembers; gone once it is whole

SHAPE = Named(
    {
        "format": COUNT,
        "fingerprint": TEXT,
        "title": TEXT,
        "made_from": TEXT,
        "input": TEXT,
        "has_time_zone": FLAG | NOTHING,
        "patients": COUNT,
        "events": Each(COUNT, 1),
        "splits": NOTHING,
        "files": Named({}, others=COUNT),
    }
)
SPLITS = Named({"digest": TEXT, "names": Each(TEXT)})


def events_file(number: int) -> str:
    """The name of the file of a piece."""
    return f"events-{number:05d}.arrow"


def is_store(folder: Path) -> bool:
    """Returns whether a folder is a store that is whole."""
    return (folder / ABOUT).is_file()


def is_begun(folder: Path) -> bool:
    """Returns whether a folder is a store of which a part is missing."""
    return (folder / WORK).is_dir() and not is_store(folder)


def about(folder: Path) -> dict[str, Any]:
    """Returns what store.json says.

    Raises MedsError for one that cannot be read, or of another format.
    """
    where = f"meds_dir={str(folder)!r}: {ABOUT}"
    try:
        found = parse_json((folder / ABOUT).read_bytes())
        if isinstance(found, dict) and found.get("format") not in (FORMAT, None):
            raise MedsError(
                f"{where} is of format {found['format']}: expected {FORMAT}; clinattn prepare "
                "makes it again"
            )
        splits = found.get("splits") if isinstance(found, dict) else None
        require(found if splits is None else found | {"splits": None}, SHAPE)
        if splits is not None:
            require(splits, SPLITS, "splits")
    except MedsError:
        raise
    except (OSError, ValueError) as error:
        raise MedsError(f"{where} cannot be read ({error}): expected that of a store") from None
    return found


