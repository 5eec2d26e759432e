"""Dropout, intervals, biases, softcap, global prefix: forward and every gradient, against fp64."""

import pytest
from cases import FEATURES
from support import BACKENDS, DTYPES, Problem, dtype_id


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_matches_truth(case, backend, dtype):
    problem = Problem(case, dtype)
    problem.check(problem.run(backend))
