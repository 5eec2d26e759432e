"""Inputs for flash-attn's functions, and what they see, pair by pair."""

import torch

DTYPES = [torch.float32, torch.bfloat16]
CAUSAL = {"causal": True}
TABLE = torch.tensor([[4, 0, 6], [1, 5, 2]], dtype=torch.int32)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch, nq, nk, heads, kv_heads, dim, dtype=torch.float32):
    """(B, N, H, D), with gradients."""
    shapes = ((nq, heads), (nk, kv_heads), (nk, kv_heads))
    return [
        draw(batch, n, h, dim, dtype=dtype, seed=at).requires_grad_()
        for at, (n, h) in enumerate(shapes)
    ]


def sees(nq, nk, causal=False, window_size=(-1, -1)):
    """Pair by pair: query i stands at the key i + nk - nq."""
    left, right = window_size
    visible = torch.zeros(nq, nk, dtype=torch.bool)
    for i in range(nq):
        for j in range(nk):
            place = i + nk - nq
            visible[i, j] = (
                (not causal or j <= place)
                and (left < 0 or j >= place - left)
                and (right < 0 or j <= place + right)
            )
    return visible


def distances(nq, nk):
    return (torch.arange(nq)[:, None] + nk - nq - torch.arange(nk)).abs().float()


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def packed(lengths_q, lengths_k, heads=4, kv_heads=2, dim=24, dtype=torch.float32):
    q, k, v = (x[0] for x in qkv(1, sum(lengths_q), sum(lengths_k), heads, kv_heads, dim, dtype))
    ends = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k)]
    return (q, k, v), (*ends, max(lengths_q, default=0), max(lengths_k, default=0))


def paged(dense, table, size):
    """Pages of size tokens for dense (B, N, H, D), which the table (B, blocks) leads to."""
    pages = torch.full((int(table.max()) + 1, size, *dense.shape[2:]), float("nan"))
    for row, blocks in zip(dense, table, strict=True):
        for block, part in zip(blocks, row.split(size), strict=False):
            pages[block, : len(part)] = part
    return pages
