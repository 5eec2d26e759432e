"""What select.py knows of a backend: its two passes, and why it cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from clinattn.backends.call import Arguments, Incoming


class Implementation(NamedTuple):
    """The two passes behind a backend.

    forward(call) returns (o, lse, lse_low), None for an lse_low that would be zeros.
    backward(call, incoming, needs) returns the Gradients, empty where not needed.
    """

    name: str
    forward: Callable[[Arguments], tuple[Any, ...]]
    backward: Callable[[Arguments, Incoming, int], tuple[torch.Tensor, ...]]


def of_ops(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Implementation:
    """The implementation by two ops, which take the rows field by field."""
    return Implementation(
        name,
        lambda call: forward(*call),
        lambda call, incoming, needs: backward(*incoming, *call, needs),
    )


class Backend(NamedTuple):
    """A backend before it is loaded.

    reasons_against(device): why it cannot run, here (None) or on a device; empty when it can.
    load(): its two passes. notes(): what to know of one that can run.
    """

    name: str
    reasons_against: Callable[[torch.device | None], list[str]]
    load: Callable[[], Implementation]
    notes: Callable[[], tuple[str, ...]] = tuple
