"""The Triton kernel of rotary in Triton's interpreter."""

import interpreter_bf16  # noqa: F401
import interpreter_patches  # noqa: F401
import pytest
import torch
from rotations import ROTATIONS, Inputs
from support import dtype_id

from clinattn import rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_matches_truth(case, dtype):
    inputs = Inputs(case, dtype)
    inputs.check(inputs.run("triton"))


def test_bits_alone_padded_and_packed():
    lengths = (75, 1, 33)
    members = [(torch.randn(2, n, 24), torch.randn(6, n, 24), torch.rand(n) * 1e4) for n in lengths]
    call = lambda *args, **keywords: rotary(*args, rotary_dim=20, backend="triton", **keywords)
    alone = [[x[0] for x in call(q[None], k[None], at)] for q, k, at in members]

    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, 80 - x.shape[-2]), value=torch.nan)
    q, k = (torch.stack([pad(m[i]) for m in members]) for i in range(2))
    at = torch.stack([pad(m[2][:, None])[:, 0] for m in members])
    padded = call(q, k, at)
    q, k = (torch.cat([m[i] for m in members], 1).transpose(0, 1) for i in range(2))
    at = torch.cat([m[2] for m in members])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = call(q, k, at, cu_seqlens=cu_seqlens)
    for s, length in enumerate(lengths):
        for i in range(2):
            assert torch.equal(padded[i][s, :, :length], alone[s][i])
            part = packed[i][cu_seqlens[s] : cu_seqlens[s + 1]]
            assert torch.equal(part.transpose(0, 1), alone[s][i])


def test_offsets_beyond_32_bits():
    """Heads of k 2^31 elements apart, in memory that is reserved but never touched."""
    stride = 2**31 + 8
    k = torch.empty(stride + 16, dtype=torch.float16).as_strided((1, 2, 1, 16), (1, stride, 1, 1))
    k = k.as_strided((1, 2, 1, 8), (1, stride, 8, 1))
    k.copy_(torch.randn(k.shape))
    q = torch.randn(1, 1, 1, 8).half()
    _, turned = rotary(q, k, torch.zeros(1), backend="triton")
    assert torch.equal(turned, k)
