"""fp32 where it is hard: numbers far from 1, and what torch.set_float32_matmul_precision allows."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from support import BACKENDS, Problem, max_error

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

CASE = Case("", nq=150, nk=170, dim=48)


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


# Of q, v and do, such that fp32 keeps its digits: smaller results would be subnormal, larger inf.
SIZES = [
    (1, 1e-33, 1),
    (1, 1, 1e-33),
    (1, 1e-20, 1e-12),
    (1, 1e25, 1e-33),
    (1e-30, 1, 1),
    (1, 1e30, 1),
    (1, 1e18, 1e18),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size(backend, sizes):
    problem = Problem(CASE, torch.float32)
    problem.dlse = None  # would outgrow what small gradients give
    for name, size in zip(("q", "v", "do"), sizes, strict=True):
        setattr(problem, name, getattr(problem, name) * size)
    problem.check(problem.run(backend))


def test_largest_values_do_not_overflow(backend):
    problem = Problem(CASE, torch.float32)
    problem.v = problem.v / problem.v.abs().max() * 2.0**126
    actual = problem.run(backend)["o"]
    ordinary = Problem(CASE, torch.float32)
    ordinary.v = problem.v * 2.0**-126
    torch.testing.assert_close(actual * 2.0**-126, ordinary.run(backend)["o"], rtol=0, atol=0)


@pytest.mark.parametrize(("allowed", "bits"), [("high", 16), ("medium", 8)])
def test_what_lower_precision_costs(backend, precision, allowed, bits):
    """Products of factors that keep 16 or 8 bits: the error is a few of their rounding units."""
    problem = Problem(CASE, torch.float32)
    precision(allowed)
    actual = problem.run(backend)
    for name, x in actual.items():
        truth = problem.truth[name]
        # of each factor half a unit is lost, and scores pass what they lose on to every gradient
        assert max_error(x, truth) <= 8 * 2.0**-bits * truth.abs().max().item(), name


def test_highest_precision_is_not_touched(backend, precision):
    problem = Problem(CASE, torch.float32)
    before = problem.run(backend)
    precision("medium")
    problem.run(backend)
    precision("highest")
    after = problem.run(backend)
    problem.check(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
