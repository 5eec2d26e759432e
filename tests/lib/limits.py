"""Limits that a process sets itself, to see what is done about them."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def largest_file(size: int):
    """No file of this process grows beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
