"""The definition in plain torch, in O(N) memory, on any device: forward, backward, and beyond.

Scores and gradients are computed in fp32, or fp64 for fp64 inputs, and rounded once.

x = scale q k';  s = f(x) + added terms, f the softcap;  p = exp(s - lse);  o = (p d) v, with d the
factors of dropout. With cotangents do, dlse:
a = d (do v');  delta = rowsum(p a) - dlse;  ds = p (a - delta);  dx = ds f'(x)
dq = scale dx k;  dk = scale dx' q;  dv = (p d)' do;  added terms get ds, summed where shared
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import Arguments, Gradients, Incoming
from clinattn.backends.reference.blocks import Block, SegmentedCall
from clinattn.backends.reference.scores import (
    Added,
    AddedGradients,
    Scores,
    dot,
    kept,
    scores,
    sum_of_added,
)


def to_rows(p: Tensor, y: Tensor) -> Tensor:
    """(b, Hkv, G, rows, keys), (b, Hkv, keys, D) -> (b, H, rows, D)."""
    return (p.flatten(2, 3) @ y).unflatten(2, p.shape[2:4]).flatten(1, 2)


def to_keys(p: Tensor, x: Tensor) -> Tensor:
    """(b, Hkv, G, rows, keys), (b, Hkv, G, rows, D) -> (b, Hkv, keys, D).

    Each head is summed by itself, as where k and v are expanded: one sum over all would be longer,
    and rounded more.
    """
    return (p.mT @ x).sum(2)


def rowsum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def exact_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and what rounding took from it (Knuth, TAOCP 2, 4.2.2)."""
    high = x + y
    part = high - x
    return high, (x - (high - part)) + (y - part)


def in_full_precision(function: Any) -> Any:
    """Autocast would lower the products inside; the ops take their dtype from their inputs."""

    @functools.wraps(function)
    def wrapper(call: Arguments, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
            return function(call, *args)

    return wrapper


def probabilities(
    problem: SegmentedCall, block: Block, lse: Tensor, lse_low: Tensor | None
) -> tuple[Tensor, Scores]:
    at = block.at_q
    lse = problem.grouped(problem.rows(lse)[at])
    found = scores(problem, block)
    s = found.s - torch.where(lse == -float("inf"), 0, lse)
    if lse_low is not None:
        s = s - problem.grouped(problem.rows(lse_low)[at])
    return torch.exp(s), found


@in_full_precision
def attention_forward(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    problem, q = SegmentedCall(call), call.q
    o = q.new_zeros((*q.shape[:-1], call.v.shape[-1]))
    shape = (q.shape[1], q.shape[0]) if problem.packed else q.shape[:-1]
    lse = q.new_full(shape, -float("inf"), dtype=problem.dtype)
    lse_low = torch.zeros_like(lse)
    for block in problem.blocks():
        s = scores(problem, block).s
        m = s.amax(-1, keepdim=True)
        p = torch.exp(s - torch.where(m == -float("inf"), 0, m))
        total = rowsum(p)
        # A row that sees nothing has p = 0 and total = 0.
        p = p / torch.where(total == 0, 1, total) * kept(problem, block)
        problem.view(o)[block.at_q] = to_rows(p, problem.keys(problem.v, block)).to(o.dtype)
        high, low = exact_sum(m, total.log())
        problem.rows(lse)[block.at_q] = high.flatten(1, 2)
        problem.rows(lse_low)[block.at_q] = torch.where(total == 0, 0, low).flatten(1, 2)
    return o, lse, lse_low


@in_full_precision
def attention_backward(call: Arguments, incoming: Incoming, needs: int) -> tuple[Tensor, ...]:
    problem = SegmentedCall(call)
    added, (q, k, v) = AddedGradients(problem, needs), (call.q, call.k, call.v)
    do, dlse, o, lse, lse_low = incoming
    dq = q.new_zeros(q.shape)
    (dk, dk_view), (dv, dv_view) = problem.zeros(k), problem.zeros(v)
    for block in problem.blocks():
        p, found = probabilities(problem, block, lse, lse_low)
        d = kept(problem, block)
        g = problem.queries(problem.view(do), block)
        delta = rowsum(g * problem.queries(problem.view(o), block))
        if dlse is not None:
            delta = delta - problem.queries(problem.rows(dlse), block)
        keys, at_k = problem.keys(problem.k, block), problem.at_k(block)
        ds = p * (d * dot(g, problem.keys(problem.v, block)) - delta)
        added.add(block, ds)
        dx = ds * found.slope * call.scale
        problem.view(dq)[block.at_q] = to_rows(dx, keys).to(dq.dtype)
        dk_view[at_k] += to_keys(dx, problem.queries(problem.q, block))
        dv_view[at_k] += to_keys(p * d, g)
    return dq, dk.to(k.dtype), dv.to(v.dtype), *added.results()


@in_full_precision
def attention_double_backward(
    call: Arguments,
    cotangents: Gradients,
    do: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    lse_low: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of the sum of <ddx, dx> over x in q, k, v, mask, ... to do, dlse and each x.

    With y = scale (ddq k' + q ddk'), u = f'(x) y + what the ddmask, ... add to scores, and w = d
    (do ddv') that sum is <ds, u> + <p, w>. Its derivative to a is c = p (u - ubar), with ubar =
    rowsum(p u); to s it is t = p (r - rowsum(p r)), with r = (a - delta) u - ubar a + w; and to x
    it is t f'(x) + ds f''(x) y. The rest is the chain rule through five products.
    """
    problem, scale = SegmentedCall(call), call.scale
    added, (q, k, v) = AddedGradients(problem, needs), (call.q, call.k, call.v)
    ddq, ddk, ddv, *dd_added = cotangents
    grad_do, grad_q = torch.zeros_like(do), q.new_zeros(q.shape)
    grad_dlse = torch.zeros_like(lse)
    (grad_k, grad_k_view), (grad_v, grad_v_view) = problem.zeros(k), problem.zeros(v)
    for block in problem.blocks():
        p, found = probabilities(problem, block, lse, lse_low)
        d, at_k = kept(problem, block), problem.at_k(block)
        rows, keys = problem.queries(problem.q, block), problem.keys(problem.k, block)
        g, values = problem.queries(problem.view(do), block), problem.keys(problem.v, block)
        drows = problem.queries(problem.view(ddq), block)
        dkeys = problem.keys(problem.view(ddk), block)
        dvalues = problem.keys(problem.view(ddv), block)
        a = d * dot(g, values)
        delta = rowsum(p * a)
        if dlse is not None:
            delta = delta - problem.queries(problem.rows(dlse), block)
        ds = p * (a - delta)
        y = (dot(drows, keys) + dot(rows, dkeys)) * scale
        u = found.slope * y
        more = sum_of_added(problem, block, Added(*dd_added))
        if more is not None:
            u = u + more
            u = u if block.visible is None else torch.where(block.visible, u, 0)
        ubar = rowsum(p * u)
        c = p * (u - ubar)
        r = (a - delta) * u - ubar * a + d * dot(g, dvalues)
        t = p * (r - rowsum(p * r))
        added.add(block, t)
        dx = (t * found.slope + ds * found.curvature * y) * scale
        dy = ds * found.slope * scale
        problem.view(grad_do)[block.at_q] = (to_rows(c * d, values) + to_rows(p * d, dvalues)).to(
            q.dtype
        )
        problem.rows(grad_dlse)[block.at_q] = ubar.flatten(1, 2)
        problem.view(grad_q)[block.at_q] = (to_rows(dx, keys) + to_rows(dy, dkeys)).to(q.dtype)
        grad_k_view[at_k] += to_keys(dx, rows) + to_keys(dy, drows)
        grad_v_view[at_k] += to_keys(c * d, g)
    grads = grad_do, grad_dlse, grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
    return *grads, *added.results()
