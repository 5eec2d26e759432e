"""Listeners to the attention calls of a thread; none until `listening` adds one.

Callers on a hot path read `listeners.on` themselves, so that nothing is spent on it while off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from clinattn.backends.call import Arguments

Listener = Callable[[Arguments, Tensor, Tensor], None]

on = 0  # listeners in all threads
_lock = threading.Lock()
_here: ContextVar[tuple[Listener, ...]] = ContextVar("clinattn listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls listener(call, o, lse) after each attention call of this thread within.

    o and lse are those that the caller gets, with their history for autograd.
    """
    global on
    token = _here.set((*_here.get(), listener))
    with _lock:
        on += 1
    try:
        yield
    finally:
        with _lock:
            on -= 1
        _here.reset(token)


def tell(call: Arguments, o: Tensor, lse: Tensor) -> None:
    for listener in _here.get():
        listener(call, o, lse)
