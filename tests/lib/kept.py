"""Results that are kept in build/ and hold for as long as what they are made of is the same."""

import hashlib
import json
import os
from pathlib import Path

from filelock import FileLock


def digest(*paths, words=()):
    """A name for the texts of files and some words, such as versions."""
    text = [*words, *(path.read_text() for path in paths)]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]


def kept(folder, name, key, make):
    """Returns make(), as JSON has it; from an earlier run if one kept it under the same key."""
    path = folder / f"{name}.{key}.json"
    if not path.exists():
        result = json.dumps(make())
        folder.mkdir(parents=True, exist_ok=True)
        for older in folder.glob(f"{name}.*.json"):
            older.unlink(missing_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(result)
        unfinished.rename(path)
    return json.loads(path.read_text())


def one_at_a_time(folder):
    """A lock of a folder that several processes of tests build in: one builds, others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(Path(f"{folder}.lock"))
