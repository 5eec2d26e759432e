"""Attention as plain maths with the whole N x N matrix: the truth, and the error of plain code."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition with the whole N x N matrix, in the dtype of its inputs."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = scale * (q @ k.mT)
    if bias is not None:
        s = s + bias.to(s.dtype)
    some = visible.any(-1, keepdim=True)
    s = torch.where(visible, s, -float("inf"))
    s = torch.where(some, s, 0.0)
    p = torch.where(some, s.softmax(-1), 0.0)
    lse = torch.where(some, s.logsumexp(-1, keepdim=True), -float("inf"))
    return p @ v, lse.squeeze(-1)


def plain_backward(
    do: Tensor,
    dlse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    scale: float,
) -> dict[str, Tensor]:
    """The gradients as they are defined, from o and lse: ds is a difference of two sums.

    Where these cancel, as with a single key, autograd through softmax has less error than any
    algorithm that keeps no N x N matrix can have; this is the plain maths of the latter.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = scale * (q @ k.mT)
    if bias is not None:
        s = s + bias.to(s.dtype)
    p = torch.where(visible, (s - torch.where(lse.isinf(), 0, lse)[..., None]).exp(), 0)
    delta = (do * o).sum(-1) - dlse
    ds = p * (do @ v.mT - delta[..., None]) * scale
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (ds.mT @ q, p.mT @ do))
    return {"dq": ds @ k, "dk": dk, "dv": dv}


def long_double(q, k, v, do, dlse, visible, bias, scale) -> dict[str, Tensor]:
    """The definition once more, for fp64: in numpy's long double, 64 bits of mantissa on x86."""
    groups = q.shape[1] // k.shape[1]
    q, k, v, do, dlse = (x.cpu().numpy().astype(np.longdouble) for x in (q, k, v, do, dlse))
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    visible = visible.cpu().numpy()
    s = np.longdouble(scale) * (q @ k.swapaxes(-1, -2))
    if bias is not None:
        s = s + bias.cpu().numpy()
    m = s.max(-1, keepdims=True, initial=-np.inf, where=visible)
    m_safe = np.where(np.isinf(m), 0, m)
    p = np.where(visible, np.exp(np.minimum(s - m_safe, 0)), 0)
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    lse = m_safe + np.log(total, out=np.full_like(total, -np.inf), where=total > 0)
    o = p @ v
    delta = (do * o).sum(-1) - dlse
    ds = p * (do @ v.swapaxes(-1, -2) - delta[..., None]) * np.longdouble(scale)
    dk, dv = (
        x.reshape(x.shape[0], x.shape[1] // groups, groups, *x.shape[2:]).sum(2)
        for x in (ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do)
    )
    results = {"o": o, "lse": lse[..., 0], "dq": ds @ k, "dk": dk, "dv": dv}
    return {name: torch.from_numpy(x.astype(np.float64)) for name, x in results.items()}


def gradients(o, lse, do, dlse, inputs) -> dict[str, Tensor]:
    outputs = [(x, dx) for x, dx in ((o, do), (lse, dlse)) if dx is not None]
    grads = torch.autograd.grad(
        [x for x, _ in outputs],
        inputs,
        [dx.to(x.dtype) for x, dx in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    results = {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    return {name: x.detach() for name, x in results.items()}


def sdpa(q, k, v, visible, bias, scale) -> tuple[Tensor, Tensor]:
    """torch's own attention; it has no lse, so a zero stands in."""
    mask = visible if bias is None else torch.where(visible, bias.to(q.dtype), -float("inf"))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o, (0 * o).sum(-1)
