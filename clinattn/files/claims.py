"""The folder of a run, for one run at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from clinattn.files.disk import require_writable_folder

LOCK = ".lock"


@contextmanager
def claimed(folder: Path, wait: bool = False) -> Iterator[None]:
    """The folder, made where it is missing, and no other process in it meanwhile.

    What a run that was killed had half written is removed; so is a folder made for a run that
    wrote nothing. This process may claim it again within. wait: for the end of another run.
    Raises ValueError where another run is in it, or where it cannot be written to.
    """
    require_writable_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=-1 if wait else 0, is_singleton=True):
            for partial in folder.glob(".*.partial*"):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
            yield
    except Timeout:
        raise ValueError(
            f"output={str(folder)!r}: another run is in it: expected one at a time, or another "
            "folder"
        ) from None
    finally:
        if made and [path.name for path in folder.iterdir()] in ([], [LOCK]):
            with suppress(OSError):  # another run has come into it
                (folder / LOCK).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
