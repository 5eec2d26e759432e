"""Products of the tiles for linear layers, and what they are held against."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import clinattn.encoder.linear  # noqa: F401  it defines the operator
from clinattn.backends import cpu

UNIT = 2.0**-24
BLOCK = 1024  # how much depth is summed at once
TILES = pytest.mark.skipif(cpu.instruction_set() != "amx", reason="needs AMX")


def product(x, weight, bias=None):
    return torch.ops.clinattn.cpu_linear(x, weight, bias)


def exact(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def assert_near(y, x, weight, bias=None):
    """No worse than as many roundings as there are products and sums, in whatever order.

    Each block of depth may be rounded to a denormal number besides.
    """
    sizes = exact(x.abs(), weight.abs(), None if bias is None else bias.abs())
    depth = x.shape[1]
    roundings = 6 * depth + 8  # six products of parts for each of numbers
    error = (y - exact(x, weight, bias)).abs()
    assert (error <= roundings * UNIT * sizes + 2.0**-149 * -(-depth // BLOCK)).all()


def matrix(rows, columns, transposed=False):
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
