"""Fixtures of the tests of CPU kernels."""

import pytest
from instruction_sets import SETS, forced


@pytest.fixture(params=SETS or [None])
def instruction_set(request):
    """Each instruction set that runs here, in force."""
    with forced(request.param):
        yield request.param
