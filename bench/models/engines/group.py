"""Engines on a load at one precision: each is opened, checked and timed in turns with others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clinattn.tools.other_work import Watch, here
from engines.apart import measure_apart
from engines.batches import BATCHINGS, Batch, outputs, padded, padding_share
from engines.check import verdict
from engines.engine import Engine, Run, package_bytes
from engines.loads import Load, published_layers
from engines.rows import Row
from engines.timing import in_turns
from engines.torch_engines import Torch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """folder: of the saved model. masked: whether any batch of the load has padding."""

    load: Load
    sequences: list[np.ndarray]
    folder: Path
    threads: int
    rounds: range
    budget: float

    @property
    def masked(self) -> bool:
        return not all(x.full for name in ("padded", "sorted") for x in self.batches(name))

    def batches(self, batching: str) -> list[Batch]:
        return BATCHINGS[batching](self.sequences, self.load.batch)

    def truth(self) -> list[np.ndarray]:
        """fp32 torch on each sequence alone."""
        run = Torch("fp32").open(self.folder, False, self.threads)
        return outputs(padded(self.sequences, 1), run)


@dataclass
class Way:
    """first: seconds of the pass that was checked, and warmed up."""

    engine: Engine
    row: Row
    batches: list[Batch]
    run: Run
    first: float


def measure(
    setting: Setting, engines: Sequence[Engine], truth: list[np.ndarray], say: Say
) -> list[Row]:
    """Rows of engines of one class."""
    ways: list[Way] = []
    for engine in engines:
        own = opened(setting, engine, truth, say)
        if engine.fallback is not None and any(way.row.not_finite for way in own):
            own += opened(setting, engine.fallback, truth, say)
        ways += own
    right = [way for way in ways if not way.row.not_finite]
    say(f"{len(right)} ways take turns")
    watch = Watch()
    found = in_turns([(way.batches, way.run) for way in right], setting.rounds, setting.budget)
    beside = here([watch.spent()], torch.device("cpu"))
    for way, rounds in zip(right, found, strict=True):
        way.row.timed(rounds, way.first)
        way.row.beside = beside
    if setting.load.apart:
        for way in right:
            say(f"{way.engine.name} in a process of its own")
            heaviest = max(way.batches, key=lambda batch: batch.ids.size)
            alone = measure_apart(
                way.engine, setting.folder, setting.masked, setting.threads, heaviest
            )
            way.row.start_seconds = alone.get("start_seconds")
            way.row.peak_memory_bytes = alone.get("peak_memory_bytes")
    return [way.row for way in ways]


def opened(setting: Setting, engine: Engine, truth: list[np.ndarray], say: Say) -> list[Way]:
    """The engine's ways, each checked; none, with a line, where the engine fails."""
    try:
        return list(_opened(setting, engine, truth, say))
    except Exception as error:  # an engine's own, of whatever type: the others still run
        say(f"{engine} failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        return []


def _opened(setting: Setting, engine: Engine, truth: list[np.ndarray], say: Say) -> list[Way]:
    load, masked = setting.load, setting.masked
    say(f"{engine.name}: converting, opening and checking")
    started = time.perf_counter()
    engine.convert(setting.folder, masked)
    converted = time.perf_counter()
    run = engine.open(setting.folder, masked, setting.threads)
    opening = time.perf_counter() - converted
    ways = []
    for batching in engine.batchings if masked else engine.batchings[:1]:
        batches = setting.batches(batching)
        began = time.perf_counter()
        rows = outputs(batches, run)
        first = time.perf_counter() - began
        not_finite, error = verdict(rows, truth)
        row = Row(
            load=load.name,
            title=load.title,
            model=load.model,
            layers=load.layers,
            published_layers=published_layers(load.model),
            kind=engine.kind,
            engine=engine.name,
            batching=batching,
            sequences=len(setting.sequences),
            batch=load.batch,
            tokens=sum(map(len, setting.sequences)),
            longest=max(map(len, setting.sequences)),
            padding_share=padding_share(batches),
            not_finite=not_finite,
            error=error,
            convert_seconds=converted - started,
            compile_seconds=opening,
            package_bytes=package_bytes(engine.packages),
        )
        ways.append(Way(engine, row, batches, run, first))
        if not_finite:
            say(f"{engine}, {batching}: NaN in real tokens of {not_finite} sequences; not timed")
    return ways
