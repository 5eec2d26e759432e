"""Files that are mapped into memory, whose pages are let go of once many of them were read."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from ..meds_files import MedsError, place
from .batches import read_batch

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa

MOST = 1 << 26  # bytes that come into memory between two times of letting go
EVERY = 1 << 21  # bytes that are read between two looks at what is in memory
AROUND = 1 << 16  # bytes that Linux maps about each place that is read, or up to 2 MB


class MappedFiles:
    """The files of a folder, each as a record batch without a copy.

    Pages of a mapped file count as memory of the process that has read them, though the system
    can take them back. `touched` lets them go where more than 64 MB have come, so that a process
    that has read all of a large store has no more of it in memory than one that has read a little.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.maps: list[mmap.mmap] = []
        self.bytes = 0  # touched since the last look
        self.before = resident() or 0

    def open(self, name: str, size: int) -> pa.RecordBatch:
        """Maps a file. Raises MedsError where it is missing, of another size, or damaged."""
        import pyarrow as pa

        path = self.folder / name
        try:
            with path.open("rb") as file:
                found = path.stat().st_size
                if found != size:
                    raise ValueError(f"it has {found} bytes and not {size}")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            batch = read_batch(pa.py_buffer(mapped))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise MedsError(
                f"{place(self.folder, path)} cannot be read ({error}): expected a file of the "
                "store as clinattn prepare has written it"
            ) from None
        self.maps.append(mapped)
        return batch

    def touched(self, count: int) -> None:
        """Counts bytes at one place that are read, and lets go of all pages where there are many.

        A page that is read again is mapped again.
        """
        self.bytes += count + AROUND
        if self.bytes < EVERY:
            return
        self.bytes = 0
        found = resident()
        if found is None or found - self.before > MOST:
            for mapped in self.maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            self.before = resident() or 0


def resident() -> int | None:
    """Bytes of mapped files that this process has in memory; None where nobody tells."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return None
