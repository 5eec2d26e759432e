"""Compiled linear layers, and what they are held against."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clinattn.backends import cpu
from clinattn.encoder.linear import WITHOUT_LAYERS
from clinattn.encoder.linear_op import Form, run

UNIT = 2.0**-24
AMX_BLOCK = 1024  # the depth whose sum is rounded to a denormal number once
PLAIN = Form(None, False, False, torch.float32)
COMPILED = pytest.mark.skipif(
    cpu.instruction_set() in WITHOUT_LAYERS, reason="needs the compiled module and AVX2"
)


def product(x, weight, bias=None):
    return run(PLAIN, x, weight, bias)[0]


def exact(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def assert_near(y, x, weight, bias=None):
    """No worse than as many roundings as there are products and sums, in whatever order.

    What is rounded may be denormal: every sum, or on AMX that of a block of depth.
    """
    sizes = exact(x.abs(), weight.abs(), None if bias is None else bias.abs())
    depth = x.shape[1]
    roundings = 6 * depth + 8  # six products of parts for each of numbers
    error = (y - exact(x, weight, bias)).abs()
    sums = -(-depth // AMX_BLOCK) if cpu.instruction_set() == "amx" else depth
    assert (error <= roundings * UNIT * sizes + 2.0**-149 * sums).all()


def matrix(rows, columns, transposed=False):
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
