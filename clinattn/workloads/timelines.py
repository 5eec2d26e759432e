"""A MEDS folder as a Source: a store as it lies, events in memory, or made into a store first."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .meds import meds_source
from .meds_files import MedsError, parquet_files, place
from .source import Source
from .store.format import is_begun, is_store
from .store.making import Progress
from .store.prepare import prepare
from .store.processes import available
from .store.reading import store_source

IN_MEMORY = 1 << 22  # events, some 100 MB: more are made into a store
BESIDE = "timelines"  # the name of the store in the folder of a run


def silent(message: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


def on_stderr(line: str) -> None:
    """Tells people a line."""
    print(line, file=sys.stderr, flush=True)


def timelines_source(
    meds_dir: str | Path,
    beside: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = on_stderr,
) -> Source:
    """Every patient of a MEDS folder or of a store.

    A folder of more events than are read into memory is made into a store first: into the folder
    `beside`, where a later run finds it, or else into a temporary folder, of which nothing is left
    when this process ends. progress, say: tell people of that.
    Raises MedsError where the folder cannot be used, and OSError.
    """
    root = Path(meds_dir)
    if is_store(root):
        return store_source(root)
    if is_begun(root):
        raise MedsError(
            f"meds_dir={str(root)!r} is a store of which a part is missing: expected a whole one; "
            "clinattn prepare goes on with it"
        )
    events = _events(root)
    if events <= IN_MEMORY:
        return meds_source(root)
    where, processes = f"meds_dir={str(root)!r}", available()
    advice = f"{events:,} events are more than are read into memory"
    if beside is not None:
        say(f"{advice}: their timelines are kept in {beside}")
        prepare(root, beside, processes, progress, wait=True)
        return store_source(beside, where)
    folder = Path(tempfile.mkdtemp(prefix="clinattn-timelines-"))
    say(f"{advice}: their timelines are in {folder} meanwhile; clinattn prepare keeps them")
    try:
        prepare(root, folder, processes, progress)
        return store_source(folder, where)
    finally:
        shutil.rmtree(folder)  # what is mapped stays until the process ends


def _events(root: Path) -> int:
    """The number of events by the files' footers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = 0
    for path in parquet_files(root):
        try:
            total += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise MedsError(
                f"{place(root, path)} cannot be read ({error}): expected a parquet file"
            ) from error
    return total
