"""Results that are kept for as long as what they are made of is the same, whatever the clone.

The folder is CLINATTN_TESTS_CACHE, or in clinattn-tests/ of the user's cache.
"""

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

from building import toolchain
from filelock import FileLock

MOST = 4  # results of one name: of the branches between which one works


def cache_folder(name: str) -> Path:
    """A folder of the cache."""
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CLINATTN_TESTS_CACHE") or Path(users) / "clinattn-tests") / name


def inductor_cache() -> Path:
    """The folder in which torch.compile keeps what it compiles, of this torch and compiler."""
    key = digest(words=[version("torch"), toolchain.compiler_version()])
    folder = cache_folder("inductor") / key
    folder.mkdir(parents=True, exist_ok=True)
    for older in newest_first(folder.parent.iterdir())[MOST:]:
        shutil.rmtree(older, ignore_errors=True)
    return folder


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
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(result)
        unfinished.rename(path)
        for older in newest_first(folder.glob(f"{name}.*.json"))[MOST:]:
            older.unlink(missing_ok=True)
    return json.loads(path.read_text())


def newest_first(paths):
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def one_at_a_time(folder):
    """A lock of a folder that several processes of tests build in: one builds, others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(Path(f"{folder}.lock"))
