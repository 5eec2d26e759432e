"""Attention of one process's queries to the keys of all, and its gradients.

A call whose queries see a window takes its keys from the neighbours at once (halo exchange). Else
keys and values of one process after the other are attended to while the next are under way, as in
ring attention (Liu, Zaharia and Abbeel, 2023), but each is sent by its owner, and only to those
that see it. The backward pass takes the lse and o of all keys, so that the gradient of each part is
that of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import Incoming
from clinattn.parallel.keys import Collected, Pair, Returned, pieces
from clinattn.parallel.merging import Merged, nothing_seen
from clinattn.parallel.plan import Piece, Plan
from clinattn.parallel.prefix_attention import (
    keys_backward,
    keys_forward,
    put,
    queries_backward,
    queries_forward,
)
from clinattn.parallel.request import Request


class SplitAttention(torch.autograd.Function):
    """q (B, n, H, D), k and v (B, n, Hkv, D or Dv) of one process, and the Request.

    Returns o (B, n, H, Dv) and lse (H, B, n).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, request: Request) -> Any:
        rows, q, prefix = q.shape[:2], q.flatten(0, 1), request.prefix
        kept: list[Tensor] = []
        parts = Merged()
        for piece, collected in pieces(request.processes, request.plan, (k, v)):
            pair = collected.pair()
            if request.keeps:
                kept += collected.received
            if piece.layout is not None:
                parts.add(request.forward(piece.layout, q, *(x.flatten(0, 1) for x in pair)))
        if prefix is not None and (more := keys_forward(request, prefix.keys, q, (k, v))):
            parts.add(more)
        results = parts.results() or nothing_seen(q, v)
        of_prefix: tuple[Any, ...] = ()
        if prefix is not None:
            attended, found = queries_forward(request, prefix.queries, q, (k, v))
            results = put(prefix.queries, found, results)
            of_prefix = (attended, *found)
        ctx.save_for_backward(q, k, v, *results, *of_prefix, *kept)
        ctx.set_materialize_grads(False)
        ctx.request = request
        return results[0].unflatten(0, rows), results[1].unflatten(1, rows)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("second derivatives: not served inside context_parallel")
        q, k, v, o, lse, lse_low, *saved = ctx.saved_tensors
        request: Request = ctx.request
        processes, plan, prefix = request.processes, request.plan, request.prefix
        of_prefix, kept = (saved[:4], saved[4:]) if prefix is not None else ([], saved)
        do = torch.zeros_like(o) if do is None else do.flatten(0, 1)
        if dlse is not None:
            dlse = dlse.flatten(1)
        elif prefix is not None:  # rows of it are sent, whether this process has any or not
            dlse = torch.zeros_like(lse)
        incoming = Incoming(do, dlse, o, lse, lse_low)
        dq, sums = zeros(q), (zeros(k), zeros(v))
        before: Returned | None = None
        received = iter(kept) if request.keeps else None
        for piece, collected in pieces(processes, plan, (k, v), received):
            grads = of_piece(request, piece, q, collected, incoming, dq)
            if 0 in piece.distances:
                add_own(sums, grads, plan, piece)
            if before is not None:
                before.add_to(sums)
            before = Returned(processes, plan, piece, grads)
            del grads, collected  # the next piece has the room
        assert before is not None
        before.add_to(sums)
        if prefix is not None:
            of_q = keys_backward(request, prefix.keys, q, (k, v), incoming, sums)
            if of_q is not None:
                dq += of_q
            dq += queries_backward(request, prefix.queries, of_prefix, (k, v), incoming, sums)
        dq = dq.to(q.dtype).unflatten(0, (len(k), -1))
        return dq, *(x.to(k.dtype) for x in sums), None


def of_piece(
    request: Request, piece: Piece, q: Tensor, collected: Collected, incoming: Incoming, dq: Tensor
) -> Pair:
    """Returns dk and dv of a piece; adds to dq."""
    pair = collected.pair()
    if piece.layout is None:
        return pair
    k, v = (x.flatten(0, 1) for x in pair)
    of_q, *grads = request.backward(piece.layout, q, k, v, incoming)
    dq += of_q
    dk, dv = (x.view(y.shape) for x, y in zip(grads, pair, strict=True))
    return dk, dv


def zeros(like: Tensor) -> Tensor:
    """Returns sums to come, in fp32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def add_own(sums: Pair, grads: Pair, plan: Plan, piece: Piece) -> None:
    """Adds the gradients of the keys in a piece that are this process's."""
    own = piece.keys.meet(plan.shard)
    for whole, part in zip(sums, grads, strict=True):
        whole[:, own.since(plan.shard.begin)] += part[:, own.since(piece.keys.begin)]
