"""Attention as plain maths with the whole N x N matrix: the truth, and the error of plain code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Terms:
    """The changes of scores and probabilities by softcap, dropout and the added parameters.

    pieces: by parameter, the index of the element that each pair (batch, heads, nq, nk) gets, and
    the factor of that element. keep: bool, the same shape.
    """

    softcap: float = 0.0
    pieces: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keep: Tensor | None = None
    dropout_p: float = 0.0
    parameters: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        return not (self.softcap or self.pieces or self.keep is not None)

    def to(self, device: str) -> Terms:
        pieces = {name: (at.to(device), by.to(device)) for name, (at, by) in self.pieces.items()}
        parameters = {name: x.to(device) for name, x in self.parameters.items()}
        keep = None if self.keep is None else self.keep.to(device)
        return replace(self, pieces=pieces, keep=keep, parameters=parameters)

    def reordered(self, i: Tensor, j: Tensor) -> Terms:
        order = lambda x: x[..., i, :][..., j]
        pieces = {name: (order(at), order(by)) for name, (at, by) in self.pieces.items()}
        keep = None if self.keep is None else order(self.keep)
        return replace(self, pieces=pieces, keep=keep)

    def added(self, parameters: dict[str, Tensor], like: Tensor) -> Tensor | float:
        total: Tensor | float = 0.0
        for name, (at, by) in self.pieces.items():
            total = total + parameters[name].to(like.dtype).flatten()[at] * by.to(like.dtype)
        return total

    def kept(self, like: Tensor) -> Tensor | float:
        """The factor on probabilities."""
        if self.keep is None:
            return 1.0
        left = 1 - round(self.dropout_p * 2**24) / 2**24
        return self.keep.to(like.dtype) / left if left else torch.zeros_like(like)


NO_TERMS = Terms()


def plain_scores(q, k, bias, scale, terms: Terms, parameters) -> tuple[Tensor, Tensor | float]:
    """Scores before anything is hidden, and the derivative of the softcap."""
    s, slope = scale * (q @ k.mT), 1.0
    if terms.softcap:
        t = torch.tanh(s / terms.softcap)
        s, slope = terms.softcap * t, 1 - t * t
    if bias is not None:
        s = s + bias.to(s.dtype)
    return s + terms.added(parameters, s), slope


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    scale: float,
    terms: Terms = NO_TERMS,
    parameters: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition with the whole N x N matrix, in the dtype of its inputs."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s, _ = plain_scores(q, k, bias, scale, terms, parameters)
    some = visible.any(-1, keepdim=True)
    s = torch.where(visible, s, -float("inf"))
    s = torch.where(some, s, 0.0)
    p = torch.where(some, s.softmax(-1), 0.0)
    lse = torch.where(some, s.logsumexp(-1, keepdim=True), -float("inf"))
    return (p * terms.kept(p)) @ v, lse.squeeze(-1)


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
    terms: Terms = NO_TERMS,
    parameters: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The gradients as they are defined, from o and lse: ds is a difference of two sums.

    Where these cancel, as with a single key, autograd through softmax has less error than any
    algorithm that keeps no N x N matrix can have; this is the plain maths of the latter.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s, slope = plain_scores(q, k, bias, scale, terms, parameters)
    p = torch.where(visible, (s - torch.where(lse.isinf(), 0, lse)[..., None]).exp(), 0)
    delta = (do * o).sum(-1) - dlse
    kept = terms.kept(p)
    ds = p * (kept * (do @ v.mT) - delta[..., None])
    grads = {}
    for name, (at, by) in terms.pieces.items():
        x = parameters[name]
        total = ds.new_zeros(x.numel())
        total.index_add_(0, at.flatten(), (ds * by.to(ds.dtype)).flatten())
        grads[f"d{name}"] = total.view(x.shape).to(x.dtype)
    dx = ds * slope * scale
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dx.mT @ q, (p * kept).mT @ do))
    return {"dq": dx @ k, "dk": dk, "dv": dv, **grads}


def long_double(q, k, v, do, dlse, visible, bias, scale, terms=NO_TERMS) -> dict[str, Tensor]:
    """The definition once more, for fp64: in numpy's long double, 64 bits of mantissa on x86."""
    wide = lambda x: x.detach().cpu().numpy().astype(np.longdouble)
    groups = q.shape[1] // k.shape[1]
    q, k, v, do, dlse = map(wide, (q, k, v, do, dlse))
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    visible = visible.cpu().numpy()
    s = np.longdouble(scale) * (q @ k.swapaxes(-1, -2))
    slope = np.longdouble(1)
    if terms.softcap:
        t = np.tanh(s / np.longdouble(terms.softcap))
        s, slope = np.longdouble(terms.softcap) * t, 1 - t * t
    if bias is not None:
        s = s + bias.cpu().numpy()
    for name, (at, by) in terms.pieces.items():
        s = s + wide(terms.parameters[name]).ravel()[at.cpu().numpy()] * wide(by)
    kept = np.longdouble(1)
    if terms.keep is not None:
        left = 1 - np.longdouble(round(terms.dropout_p * 2**24)) / 2**24
        kept = wide(terms.keep) / (left if left else np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf, where=visible)
    m_safe = np.where(np.isinf(m), 0, m)
    p = np.where(visible, np.exp(np.minimum(s - m_safe, 0)), 0)
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    lse = m_safe + np.log(total, out=np.full_like(total, -np.inf), where=total > 0)
    o = (p * kept) @ v
    delta = (do * o).sum(-1) - dlse
    ds = p * (kept * (do @ v.swapaxes(-1, -2)) - delta[..., None])
    results = {"o": o, "lse": lse[..., 0]}
    for name, (at, by) in terms.pieces.items():
        x = terms.parameters[name]
        grad = np.zeros(x.numel(), np.longdouble)
        np.add.at(grad, at.cpu().numpy().ravel(), (ds * wide(by)).ravel())
        results[f"d{name}"] = grad.reshape(x.shape)
    dx = ds * slope * np.longdouble(scale)
    dk, dv = (
        x.reshape(x.shape[0], x.shape[1] // groups, groups, *x.shape[2:]).sum(2)
        for x in (dx.swapaxes(-1, -2) @ q, (p * kept).swapaxes(-1, -2) @ do)
    )
    results |= {"dq": dx @ k, "dk": dk, "dv": dv}
    return {name: torch.from_numpy(x.astype(np.float64)) for name, x in results.items()}


def gradients(o, lse, do, dlse, inputs, parameters=None) -> dict[str, Tensor]:
    """Returns o, lse and gradients by name. parameters: further inputs by name."""
    parameters = parameters or {}
    outputs = [(x, dx) for x, dx in ((o, do), (lse, dlse)) if dx is not None]
    grads = torch.autograd.grad(
        [x for x, _ in outputs],
        [*inputs, *parameters.values()],
        [dx.to(x.dtype) for x, dx in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    names = ("dq", "dk", "dv", *(f"d{name}" for name in parameters))
    results = {"o": o, "lse": lse, **dict(zip(names, grads, strict=True))}
    return {name: x.detach() for name, x in results.items()}


def sdpa(q, k, v, visible, bias, scale) -> tuple[Tensor, Tensor]:
    """torch's own attention; it has no lse, so a zero stands in."""
    mask = visible if bias is None else torch.where(visible, bias.to(q.dtype), -float("inf"))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o, (0 * o).sum(-1)
