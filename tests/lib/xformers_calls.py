"""Calls of memory_efficient_attention for tests: inputs, what is seen, and the check of results."""

import math

import torch
from compared import gradients_of

from clinattn.integrations import xformers as xf

INF = math.inf
BOTTOM_RIGHT = {"bottom_right": True}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch, nq, nk, *heads, dim=24, dim_v=None, dtype=torch.float32):
    """Returns q, k and v (B, M, ..., K), with gradients."""
    shapes = ((nq, dim), (nk, dim), (nk, dim_v or dim))
    return [
        draw(batch, n, *heads, d, dtype=dtype, seed=at).requires_grad_()
        for at, (n, d) in enumerate(shapes)
    ]


def sees(nq, nk, left=INF, right=INF, bottom_right=False):
    """Returns which pairs are seen; windows count from the query's place among the keys."""
    shift = nk - nq if bottom_right else 0
    rows = [[i + shift - left <= j <= i + shift + right for j in range(nk)] for i in range(nq)]
    return torch.tensor(rows, dtype=torch.bool).view(nq, nk)


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def attend(q, k, v, bias=None, **words):
    """Returns (out, lse), of which memory_efficient_attention returns out."""
    out, lse = xf.memory_efficient_attention_partial(q, k, v, bias, output_dtype=q.dtype, **words)
    assert torch.equal(out, xf.memory_efficient_attention(q, k, v, bias, **words))
    return out, lse


def check(problem, out, lse, flat=lambda x: x, **inputs):
    """Checks out, lse and all gradients; flat makes (B, M, H, K) of a tensor in another layout."""
    cotangents = [problem.do.transpose(1, 2).reshape(out.shape), problem.dlse.view(lse.shape)]
    grads = gradients_of([out, lse], cotangents, **inputs)
    results = {"o": out, **{name: grads.pop(name) for name in ("dq", "dk", "dv")}}
    results = {name: flat(x).transpose(1, 2) for name, x in results.items()}
    problem.check({"lse": lse.view(problem.dlse.shape), **results, **grads})
