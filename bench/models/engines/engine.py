"""Interface of an engine to the benchmark. Methods import the packages of the engine themselves."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engines.batches import Batch

if TYPE_CHECKING:
    from engines.loads import Load

Run = Callable[[Batch], Any]  # -> (B, N, C) hidden states: an array, or a tensor

KINDS = ("fp32", "16 bit", "8 bit")  # classes of precision, never compared with each other


class Engine:
    """An engine at one precision.

    packages: what must be installed where it serves. converts: what converting to it needs besides.
    batchings: names in BATCHINGS, the best of those that it can do. remedy: where other than
    installing `packages` helps. fallback: tried too where this one gives NaN.
    """

    name: str
    kind: str
    packages: ClassVar[tuple[str, ...]]
    converts: ClassVar[tuple[str, ...]] = ()
    batchings: ClassVar[tuple[str, ...]] = ("padded", "sorted")
    fallback: Engine | None = None

    def __init__(self, kind: str):
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.name}, {self.kind}"

    def missing(self) -> str | None:
        """Returns a line on why the engine cannot run here and what helps; None where it can."""
        absent = [x for x in (*self.packages, *self.converts) if not importlib.util.find_spec(x)]
        if not absent:
            return None
        return f"{self}: no package {', '.join(absent)}; pip install 'clinattn[engines]'"

    def too_large(self, load: Load) -> str | None:
        """Returns a line on why this machine's memory cannot hold the load; None where it can."""
        return None

    def convert(self, folder: Path, masked: bool) -> None:
        """Writes what `open` reads beside the saved model, once; offline work of a user.

        masked: the graph takes a mask of padding too.
        """

    def open(self, folder: Path, masked: bool, threads: int) -> Run:
        """The model as a function of a batch, on so many threads."""
        raise NotImplementedError


def package_bytes(packages: tuple[str, ...]) -> int:
    """Bytes on disk of the packages' folders, and of the libraries that wheels put beside them."""
    total = 0
    for name in packages:
        found = importlib.util.find_spec(name)
        assert found is not None and found.submodule_search_locations
        for place in map(Path, found.submodule_search_locations):
            for folder in (place, place.with_name(f"{place.name}.libs")):
                total += sum(
                    (Path(at) / file).stat().st_size
                    for at, _, files in os.walk(folder)
                    if "__pycache__" not in at
                    for file in files
                )
    return total
