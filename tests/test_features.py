"""Dropout, intervals, biases, softcap, global prefix: forward and every gradient, against fp64."""

import pytest
from cases import FEATURES
from support import BACKENDS, DTYPES, Problem, dtype_id, serves

CASES = [
    pytest.param(case, backend, id=f"{case}-{backend}")
    for case in FEATURES
    for backend in BACKENDS
    if serves(backend, case)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case, backend", CASES)
def test_matches_truth(case, backend, dtype):
    problem = Problem(case, dtype)
    problem.check(problem.run(backend))
