"""Denormals are operands as other numbers are, on every instruction set that runs here."""

import importlib

import pytest
import torch
from support import dtype_id

import clinattn
from clinattn import fused_attention

_C = importlib.import_module("clinattn._C") if clinattn.backends()["cpu"] else None
SETS = _C.instruction_sets() if _C else []

pytestmark = pytest.mark.skipif(_C is None, reason="the compiled backend is not built here")


@pytest.fixture(params=SETS or [None])
def instruction_set(request, threads):
    threads(1)
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set("")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_denormal_operands_count(dtype, instruction_set):
    """The smallest subnormal of fp16 is a number as any other, and its mean is exact."""
    tiny = torch.finfo(torch.float16).smallest_normal / 16
    q, k = torch.randn(2, 1, 1, 33, 16).to(dtype)
    v = torch.full_like(q, tiny)
    o = fused_attention(q, k, v, backend="cpu")
    assert torch.equal(o, v)
