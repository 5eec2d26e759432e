"""Random mixtures of all arguments, the same ones at every run."""

import pytest
from mixtures import check_part
from support import BACKENDS, DTYPES


@pytest.mark.parametrize("part", range(10))
def test_any_mixture_matches_truth(part):
    """On every backend."""
    check_part(BACKENDS, part, 20, DTYPES)
