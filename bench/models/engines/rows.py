"""Row of the benchmark: an engine on a load at one precision, by one batching."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from clinattn.tools.benchmark.measure import quartiles


@dataclass
class Row:
    """layers: of the model that was run, of the `published_layers` that it is published with.

    tokens: real ones. seconds: of each round. latency_s: the median of a batch. error: root mean
    square against fp32 torch on each sequence alone, relative; None, and nothing timed, where
    `not_finite` sequences had NaN in a real token. compile_seconds: from the converted model on
    disk to one that has run every shape, less a pass. start_seconds, peak_memory_bytes: of a
    process of its own, up to the first batch's result; None for loads where they are not measured.
    """

    load: str
    title: str
    model: str
    layers: int
    published_layers: int
    kind: str
    engine: str
    batching: str
    sequences: int
    batch: int
    tokens: int
    longest: int
    padding_share: float
    not_finite: int
    error: float | None
    convert_seconds: float
    compile_seconds: float
    package_bytes: int
    seconds: list[float] = field(default_factory=list)
    latency_s: float | None = None
    start_seconds: float | None = None
    peak_memory_bytes: int | None = None
    beside: dict[str, Any] = field(default_factory=dict)

    def timed(self, rounds: list[list[float]], first: float) -> None:
        """rounds: seconds by round and batch. first: of the first pass, which warmed up."""
        self.seconds = [sum(batches) for batches in rounds]
        self.latency_s = statistics.median(x for batches in rounds for x in batches)
        self.compile_seconds += max(0.0, first - statistics.median(self.seconds))

    def record(self) -> dict[str, Any]:
        measured = asdict(self)
        beside = measured.pop("beside")
        rate = quartiles([self.tokens / s for s in self.seconds]) if self.seconds else None
        return measured | {"tokens_per_s": rate} | beside
