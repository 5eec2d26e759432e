"""Files: written whole or not at all, and checked before the work whose result goes there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEEPEST = 64  # levels of a JSON file; ours have seven


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def written_whole(path: str | Path, private: bool = False) -> Iterator[Path]:
    """Yields a path beside `path`; what is written there takes its place once it is on the disk.

    A failure, or a kill, leaves the file that was there. A device or a pipe is written to directly.
    private: the file is for its owner alone, mode 0600, from its first byte.
    """
    if is_device(path):
        with naming(path):
            yield Path(path)
        return
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        with naming(path):
            if private:
                partial.unlink(missing_ok=True)
                os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists() and not private:
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except OSError as error:
        if error.filename == str(partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a folder beside `path`, which takes its place once all in it is written.

    A failure, or a kill, leaves nothing at `path`, where an empty folder may be. Raises OSError.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(path):
            partial.mkdir(parents=True)
            yield partial
            if target.is_dir():
                target.rmdir()
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_device(path: str | Path) -> bool:
    """True for an existing path that is neither a file nor a folder, as a device or a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write_text(path: str | Path, text: str, private: bool = False) -> None:
    """Write a file whole, in UTF-8; half of a surrogate pair, which has none, becomes a '?'.

    private: as in written_whole.
    """
    with written_whole(path, private) as partial:
        partial.write_bytes(text.encode("utf-8", "replace"))


def require_writable(path: str | Path, name: str = "output") -> None:
    """Checks that a file can be written there. name: of the argument, for the message.

    Raises ValueError.
    """
    given, folder = f"{name}={str(path)!r}", Path(os.path.realpath(path)).parent
    if os.path.isdir(path):
        raise ValueError(f"{given} is a folder: expected a file")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise ValueError(f"{given}: permission denied: expected a file that can be written to")
    if is_device(path):
        return
    if not folder.is_dir():
        raise ValueError(f"{given}: {str(Path(path).parent)!r} is no folder: expected one")
    _try(folder, given)


def require_writable_folder(path: str | Path, name: str = "output") -> None:
    """Checks that files can be written into this folder, or that it can be made; makes nothing.

    name: of the argument, for the message. Raises ValueError.
    """
    given, folder = f"{name}={str(path)!r}", Path(os.path.realpath(path))
    there = next(x for x in (folder, *folder.parents) if x.exists())
    if not there.is_dir():
        which = "" if there == folder else f" is in {str(there)!r}, which"
        raise ValueError(f"{given}{which} is a file: expected a folder")
    _try(there, given)


def require_new_folder(path: str | Path, name: str = "output") -> None:
    """Checks that a folder can be made there, or that an empty one is there. Raises ValueError."""
    require_writable_folder(path, name)
    if Path(path).is_dir() and (held := sorted(x.name for x in Path(path).iterdir())):
        raise ValueError(f"{name}={str(path)!r} holds {held[0]}: expected a new or empty folder")


def _try(folder: Path, given: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{given}: {error.strerror}: expected a folder that can be written to"
        ) from None


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for whatever is no JSON, or is nested deeper than any file of ours."""
    too_deep = f"nested deeper than {DEEPEST} levels"
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [found]
    for _ in range(DEEPEST):
        level = [
            x
            for value in level
            if isinstance(value, (dict, list))
            for x in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(too_deep)
    return found
