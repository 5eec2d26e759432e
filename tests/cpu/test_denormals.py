"""Denormals are operands as other numbers are, on every instruction set that runs here."""

import pytest
import torch
from instruction_sets import BUILT
from support import dtype_id

from clinattn import fused_attention

pytestmark = BUILT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_denormal_operands_count(dtype, instruction_set):
    """The smallest subnormal of fp16 is a number as any other, and its mean is exact."""
    tiny = torch.finfo(torch.float16).smallest_normal / 16
    q, k = torch.randn(2, 1, 1, 33, 16).to(dtype)
    v = torch.full_like(q, tiny)
    o = fused_attention(q, k, v, backend="cpu")
    assert torch.equal(o, v)
