"""The instruction sets of the compiled backend that run here, for tests that force each in turn."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from clinattn.backends import compiled

MODULE = compiled.compiled_module()
SETS = MODULE.instruction_sets() if MODULE else []  # the best one last
BUILT = pytest.mark.skipif(MODULE is None, reason="the compiled backend is not built here")


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """The compiled backend uses this set, and afterwards the best one again."""
    MODULE.set_instruction_set(name)
    try:
        yield
    finally:
        MODULE.set_instruction_set("")
