"""Makes a store of a MEDS folder, in two passes that go on where an earlier run has ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from clinattn.files.claims import LOCK, claimed
from clinattn.files.disk import parse_json, write_text

from ..meds_files import MedsError
from .format import FORMAT, WORK, about, is_store
from .inputs import Input, changed, digest, events_in, inputs_of
from .making import Making, Progress
from .processes import Workers

BEGUN = "begun.json"
WORTH = 1 << 21  # events that are worth a process of their own, which takes a second to begin


def prepare(
    meds_dir: str | Path,
    output: str | Path,
    processes: int,
    progress: Progress = lambda message, done, total: None,
    wait: bool = False,
) -> bool:
    """Makes the store `output` of a MEDS folder; returns False where it was whole before.

    output: a new or empty folder, or one in which the same was begun. processes: at a time; the
    files are the same for any number. wait: for another run in the folder, else an error.
    Raises MedsError where the MEDS folder cannot be used, or has changed since the store was
    begun, ValueError where something else is in `output`, OSError and ChildProcessError.
    """
    root, folder = Path(meds_dir), Path(output)
    if is_store(root):
        raise MedsError(f"meds_dir={str(root)!r} holds timelines already: expected a MEDS folder")
    inputs, zoned = inputs_of(root)
    _require_own(folder)
    with claimed(folder, wait):
        if is_store(folder):
            _require_made_from(folder, root, inputs)
            shutil.rmtree(folder / WORK, ignore_errors=True)
            return False
        _begin(folder, root, inputs)
        try:
            with Workers(max(1, min(processes, events_in(inputs) // WORTH))) as workers:
                Making(root, folder, inputs, workers, progress).run(zoned)
        finally:
            _sweep(folder)
        shutil.rmtree(folder / WORK)
    return True


def _require_own(folder: Path) -> None:
    """Checks that a folder has no more in it than a store or the beginning of one."""
    if not folder.is_dir() or is_store(folder) or (folder / WORK / BEGUN).exists():
        return
    held = sorted({path.name for path in folder.iterdir()} - {LOCK, WORK})
    if held:
        raise ValueError(
            f"output={str(folder)!r} holds {held[0]}: expected a new or empty folder, or one that "
            "clinattn prepare has begun"
        )


def _require_made_from(folder: Path, root: Path, inputs: Sequence[Input]) -> None:
    said = about(folder)
    if said["input"] != digest(inputs):
        raise MedsError(
            f"{str(folder)!r} holds the timelines of {said['made_from']} as it was when they were "
            f"made: expected those of {root.resolve()} as it is now, or another folder"
        )


def _begin(folder: Path, root: Path, inputs: Sequence[Input]) -> None:
    """Notes what the store is made from, or checks that it is what was noted before."""
    path = folder / WORK / BEGUN
    if not path.exists():
        folder.chmod(0o700)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        begun = {"format": FORMAT, "made_from": str(root.resolve()), "inputs": inputs}
        write_text(path, json.dumps(begun) + "\n", private=True)
        return
    _sweep(folder)
    before = parse_json(path.read_bytes())
    if (before["format"], before["made_from"]) != (FORMAT, str(root.resolve())):
        raise MedsError(
            f"{str(folder)!r} holds the beginning of the timelines of {before['made_from']}: "
            f"expected those of {root.resolve()}, or another folder"
        )
    then = {file[0]: file for file in before["inputs"]}
    now = {file.name: json.loads(json.dumps(file)) for file in inputs}
    differ = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if differ:
        raise MedsError(changed(root, differ[0]))


def _sweep(folder: Path) -> None:
    """Removes what processes that were ended had half written."""
    for place in (folder, folder / WORK):
        for partial_file in place.glob(".*.partial*"):
            partial_file.unlink(missing_ok=True)
