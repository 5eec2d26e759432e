"""The dense shapes that stages time, and the visible pairs that their FLOP are counted from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TOKENS, WIDTH = 16_384, 2048  # batch times length, and heads times head_dim


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    n: int
    dim: int
    mask: str = "full"  # or causal, window128

    def pairs(self) -> int:
        if self.mask == "causal":
            return self.n * (self.n + 1) // 2
        return pairs_in_window(self.n, 128 if self.mask == "window128" else None)

    def flops(self) -> int:
        """4D for each visible pair forward; backward takes 10D."""
        return 4 * self.dim * self.batch * self.heads * self.pairs()


def shapes(dryrun: bool) -> Iterator[Shape]:
    masks = ("full", "causal", "window128")
    if dryrun:
        yield from (Shape(1, 1, 24, 16, mask) for mask in masks)
        return
    for n in (8192, 4096, 1024, 16_384, 512, 2048):
        for dim in (64, 128):
            for mask in masks:
                yield Shape(max(1, TOKENS // n), WIDTH // dim, n, dim, mask)


def pairs_in_window(n: int, window: int | None) -> int:
    side = n - 1 if window is None else min(window, n - 1)
    return n * (2 * side + 1) - side * (side + 1)
