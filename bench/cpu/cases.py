"""The cases that run.py times: shapes, dtypes, and the ratio to torch's time that each aims at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from suites.problem import AttentionCase, OursDense, OursPacked, Way, drawn, ours

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Entry:
    """targets: for each dtype that is timed, (forward, backward), or None for no target.

    ways: ours by what it is called in the table. isa: forced on both sides, in its own process.
    """

    name: str
    case: AttentionCase
    targets: Mapping[str, tuple[float, float] | None]
    ways: Mapping[str, Callable[[AttentionCase, list[Tensor]], Way]] = field(
        default_factory=lambda: {"": ours}
    )
    isa: str | None = None

    def label(self, dtype: str, passes: str) -> str:
        return " ".join([self.name, *filter(None, self.ways), dtype, passes])

    def target(self, dtype: str, passes: str) -> float | None:
        targets = self.targets[dtype]
        return None if targets is None else targets[PASSES.index(passes)]


def square(n: int, heads: int, dim: int, **keywords: object) -> AttentionCase:
    return AttentionCase((n,), heads, dim, **keywords)  # type: ignore[arg-type]


def sweep() -> Iterator[Entry]:
    """Full and causal over lengths."""
    targets = {
        "full": {"fp32": (1.25, 1.5), "bf16": (2.0, 4.0), "fp16": (1.5, 2.0)},
        "causal": {"fp32": (1.5, 1.6), "bf16": (2.2, 4.0), "fp16": (1.5, 2.0)},
    }
    for mask, by_dtype in targets.items():
        for dim in (64, 128):
            for n in (1024, 2048, 4096, 8192):
                case = square(n, 4 if n < 8192 else 2, dim, is_causal=mask == "causal")
                dtypes = by_dtype.keys() if n in (1024, 4096) else ("fp32", "bf16")
                yield Entry(f"{mask} N{n} D{dim}", case, {d: by_dtype[d] for d in dtypes})


def forced_avx2() -> Iterator[Entry]:
    for mask in ("full", "causal"):
        for dim in (64, 128):
            case = square(2048, 4, dim, is_causal=mask == "causal")
            yield Entry(f"avx2 {mask} N2048 D{dim}", case, {"fp32": (1.1, 1.3)}, isa="avx2")


def both(forward: float, backward: float) -> dict[str, tuple[float, float] | None]:
    return {"fp32": (forward, backward), "bf16": (forward, backward)}


ENTRIES: tuple[Entry, ...] = (
    *sweep(),
    Entry("short rows 256x12x128", AttentionCase((128,) * 256, 12, 64), both(1.5, 2)),
    Entry("one long row 16384", square(16384, 1, 64), both(1.3, 2)),
    Entry(
        "notes 8x12",
        AttentionCase(drawn("note_discharge", 8, 4096), 12, 64),
        both(2, 2.5),
        {"padded": OursDense, "packed": OursPacked},
    ),
    Entry("window 128 of 8192", square(8192, 2, 64, window=128), both(20, 20)),
    Entry("gqa 8:2 N2048", square(2048, 8, 64, kv_heads=2), {"fp32": None, "bf16": None}),
    *forced_avx2(),
)


def chosen(entries: tuple[Entry, ...], words: str) -> Iterator[tuple[Entry, str, list[str]]]:
    """(entry, dtype, passes) of those measurements whose label has every one of the words in it."""
    for entry in entries:
        for dtype in entry.targets:
            labels = {passes: entry.label(dtype, passes) for passes in PASSES}
            passes = [p for p in PASSES if all(w in labels[p] for w in words.split())]
            if passes:
                yield entry, dtype, passes
