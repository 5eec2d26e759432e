"""Results of a run so far, in a folder beside its file, from which an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clinattn.files.disk import parse_json, write_text, written_whole

MANIFEST = "manifest.json"


class Part(NamedTuple):
    """Results of consecutive rows from `first` on.

    logits: (R, outputs) fp64, with none for a model without classes. states: (R, hidden) fp32,
    with none where no embeddings are asked for.
    """

    first: int
    logits: np.ndarray
    states: np.ndarray

    @property
    def end(self) -> int:
        return self.first + len(self.logits)


class Parts:
    """The parts in a folder. identity: by which a run knows its own parts, names to texts."""

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.folder, self.identity = folder, identity

    def start(self) -> None:
        text = json.dumps(dict(self.identity), indent=1) + "\n"
        write_text(self.folder / MANIFEST, text, private=True)

    def check(self) -> None:
        """Raises ValueError where the parts are of another checkpoint, data or setting."""
        path = self.folder / MANIFEST
        try:
            found = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"resume: {str(path)!r} cannot be read: {error}") from None
        require_same(self.identity, found, str(path))

    def done(self) -> int:
        """The number of rows from the first on whose results are there and intact."""
        end = 0
        for part in self:
            end = part.end
        return end

    def add(self, part: Part) -> None:
        with written_whole(self._path(part.first), private=True) as path, path.open("wb") as file:
            np.savez(file, logits=part.logits, states=part.states)

    def __iter__(self) -> Iterator[Part]:
        """Yields parts from the first row on, up to the first that is missing or damaged."""
        end = 0
        while (part := self._read(end)) is not None and len(part.logits):
            yield part
            end = part.end

    def _path(self, first: int) -> Path:
        return self.folder / f"part-{first:010d}.npz"

    def _read(self, first: int) -> Part | None:
        try:
            with np.load(self._path(first), allow_pickle=False) as found:
                return Part(first, found["logits"], found["states"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # damaged: it is computed again

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def require_same(wanted: Mapping[str, str], found: Any, where: str) -> None:
    """Raises ValueError that names the first thing in which an earlier run differs."""
    for name, value in wanted.items():
        before = found.get(name) if isinstance(found, dict) else None
        if before != value:
            raise ValueError(f"resume: {name} is {value!r}: expected {before!r} as in {where}")
