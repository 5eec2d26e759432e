"""Random mixtures of all arguments, the same ones at every run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import SETTINGS, cases, check
from support import BACKENDS, DTYPES


@pytest.mark.parametrize("backend", BACKENDS)
@settings(SETTINGS, max_examples=300, derandomize=True)
@given(mixture=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_any_mixture_matches_truth(mixture, dtype, seed, backend):
    check(backend, mixture, dtype, seed)
