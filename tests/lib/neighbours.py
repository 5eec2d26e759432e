"""A few sequences alone, padded and packed: for kernels on slow devices, whose bits must agree.

test_bitwise.py has more of them for those that are fast on the CPU.
"""

from unittest import mock

import torch

from clinattn import fused_attention, fused_attention_varlen
from clinattn.operator import visibility

LENGTHS = (75, 1, 33)
KEYWORDS = {"plain": {}, "causal": {"is_causal": True}, "window": {"window": (20, 9)}}


def evaluate(call, q, k, v, do, dlse, **keywords):
    """[o, lse, dq, dk, dv]"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = call(q, k, v, enable_gqa=True, return_lse=True, **keywords)
    grads = torch.autograd.grad([o, lse], [q, k, v], [do, dlse])
    return [x.detach() for x in (o, lse, *grads)]


def sequences(dtype):
    """Yields q, k, v, do (H, n, D) and dlse (H, n) for each length."""
    for n in LENGTHS:
        q, do = (torch.randn(2, n, 24).to(dtype) for _ in range(2))
        k, v = (torch.randn(1, n, 24).to(dtype) for _ in range(2))
        yield q, k, v, do, torch.randn(2, n)


def padded(x, before, after):
    """x with `before` and `after` rows of NaN around its tokens."""
    pad = x.new_full((x.shape[0], before + after, *x.shape[2:]), torch.nan)
    return torch.cat([pad[:, :before], x, pad[:, before:]], 1)


def check_bits(backend, keywords, dtype):
    """Right padding by lengths, left padding by kv_start, and packing change no bit."""
    keywords = {**keywords, "backend": backend}
    members = list(sequences(dtype))
    alone = [
        [x[0] for x in evaluate(fused_attention, *(x[None] for x in member), **keywords)]
        for member in members
    ]
    n = max(LENGTHS) + 7
    right = [
        torch.stack([padded(member[i], 0, n - member[i].shape[1]) for member in members])
        for i in range(5)
    ]
    lengths = torch.tensor(LENGTHS)
    results = evaluate(fused_attention, *right, q_lengths=lengths, kv_lengths=lengths, **keywords)
    for s, length in enumerate(LENGTHS):
        assert_equal([x[s, :, :length] for x in results], alone[s], f"right, sequence {s}")

    packed = [torch.cat([member[i] for member in members], 1) for i in range(5)]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    results = evaluate(
        fused_attention_varlen, *(x.transpose(0, 1) for x in packed[:4]), packed[4],
        cu_seqlens_q=cu_seqlens, **keywords,
    )  # fmt: skip
    for s, length in enumerate(LENGTHS):
        at = slice(int(cu_seqlens[s]), int(cu_seqlens[s]) + length)
        actual = [x[:, at] if x.dim() == 2 else x[at].transpose(0, 1) for x in results]
        assert_equal(actual, alone[s], f"packed, sequence {s}")

    for s, (q, k, v, do, dlse) in enumerate(members):
        before = n - LENGTHS[s]
        # finite numbers: in full attention, queries in the padding do see keys
        q, do, dlse = (padded(x, before, 0).nan_to_num(0.0) for x in (q, do, dlse))
        arguments = [x[None] for x in (q, padded(k, before, 0), padded(v, before, 0), do, dlse)]
        mask = (torch.arange(n) >= before)[None, None, None]
        # as it is, and where it cannot be seen to be a range, as on a device
        for concrete in (True, False):
            with mock.patch.object(visibility, "concrete", return_value=concrete):
                results = evaluate(fused_attention, *arguments, attn_mask=mask, **keywords)
            assert_equal([x[0, :, before:] for x in results], alone[s], f"left, sequence {s}")


def assert_equal(actual, expected, context):
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert torch.equal(a, b), f"{name} {context}: {(a != b).sum()} of {a.numel()} differ"
