"""Random mixtures of all arguments, the same ones at every run."""

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from mixtures import SETTINGS, cases, check
from support import BACKENDS, DTYPES

PARTS, EXAMPLES = 10, 20


@pytest.mark.parametrize("part", range(PARTS))
def test_any_mixture_matches_truth(part):
    """On every backend; each part has mixtures of its own."""

    @seed(part)
    @settings(SETTINGS, max_examples=EXAMPLES)
    @given(mixture=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
    def run(mixture, dtype, seed):
        check(BACKENDS, mixture, dtype, seed)

    run()
