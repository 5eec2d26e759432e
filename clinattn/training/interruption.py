"""Ctrl-C, and the signal that ends a job: finish the step, save, then end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """signal: the number of the one that came, 0 before."""

    signal = 0


@contextmanager
def deferred_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM are noted at first; a second one acts as it would have at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
