"""What select.py knows of a backend: its two passes, and why it cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Implementation(NamedTuple):
    """The two functions behind a backend; their arguments are those of the ops, less `backend`.

    forward gives None for an lse_low that would be zeros.
    """

    name: str
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[torch.Tensor, ...]]


class Backend(NamedTuple):
    """A backend before it is loaded.

    reasons_against(device): why it cannot run, here (None) or on a device; empty when it can.
    load(): its two passes. notes(): what to know of one that can run.
    """

    name: str
    reasons_against: Callable[[torch.device | None], list[str]]
    load: Callable[[], Implementation]
    notes: Callable[[], tuple[str, ...]] = tuple
