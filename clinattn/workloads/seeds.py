"""Numbers that follow from names alone: no state, so a run can start again anywhere in its data."""

from __future__ import annotations

import hashlib

import numpy as np

HOLD_OUT_RANGE = 2**63


def derived_seed(*names: int | str) -> int:
    """A seed in 0..2^63 - 1 that is the same for the same names, on every machine."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def hold_out_draw(subject: int | str) -> int:
    """A number in 0..HOLD_OUT_RANGE - 1 of a subject, whatever the seed or other subjects."""
    return derived_seed("held out", str(subject))


def is_held_out(subject: int | str, share: float) -> bool:
    """Returns whether a subject is in the held-out `share`."""
    return hold_out_draw(subject) < share * HOLD_OUT_RANGE


def scattered(x: np.ndarray) -> np.ndarray:
    """(N,) uint64 to numbers that look drawn, each to one: splitmix64's last steps.

    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
