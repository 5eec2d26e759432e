"""Attention of one process's queries to the keys of all, and its gradients.

A call whose queries see a window takes its keys from the neighbours at once (halo exchange). Else
keys and values of one process after the other are attended to while the next are under way, as in
ring attention (Liu, Zaharia and Abbeel, 2023), but each is sent by its owner, and only to those
that see it. The backward pass takes the lse and o of all keys, so that the gradient of each part is
that of the whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clinattn.backends.call import Arguments, Incoming
from clinattn.operator import ops
from clinattn.parallel.keys import Pair, Returned, pieces
from clinattn.parallel.merging import Merged, Results
from clinattn.parallel.plan import Piece, Plan
from clinattn.parallel.processes import Processes


class Request(NamedTuple):
    """What is asked for beside q, k and v.

    keeps: whether the backward pass has the received keys at hand; else they are sent again.
    """

    processes: Processes
    plan: Plan
    scale: float
    softcap: float
    backend: str
    keeps: bool

    def call(self, piece: Piece, q: Tensor, pair: Pair) -> Arguments:
        """Returns the call of queries (B, n, H, D) to the keys of a piece."""
        assert piece.layout is not None
        q, k, v = (x.flatten(0, 1) for x in (q, *pair))
        return piece.layout.call(q, k, v, self.scale, self.softcap)


class SplitAttention(torch.autograd.Function):
    """q (B, n, H, D), k and v (B, n, Hkv, D or Dv) of one process, and the Request.

    Returns o (B, n, H, Dv) and lse (H, B, n).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, request: Request) -> Any:
        kept: list[Tensor] = []
        merged = Merged()
        for piece, collected in pieces(request.processes, request.plan, (k, v)):
            pair = collected.pair()
            if request.keeps:
                kept += collected.messages
            if piece.layout is not None:
                merged.add(ops.forward(request.call(piece, q, pair), request.backend))
        o, lse, lse_low = merged.results() or nothing_seen(q, v)
        ctx.save_for_backward(q, k, v, o, lse, lse_low, *kept)
        ctx.set_materialize_grads(False)
        ctx.request = request
        rows = q.shape[:2]
        return o.unflatten(0, rows), lse.unflatten(1, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, o, lse, lse_low, *kept = ctx.saved_tensors
        request: Request = ctx.request
        processes, plan = request.processes, request.plan
        do = torch.zeros_like(o) if do is None else do.flatten(0, 1)
        incoming = Incoming(do, None if dlse is None else dlse.flatten(1), o, lse, lse_low)
        received = iter(kept) if request.keeps else None
        dq, sums = zeros(q), (zeros(k), zeros(v))
        before: Returned | None = None
        for piece, collected in pieces(processes, plan, (k, v), received):
            pair = collected.pair()
            grads = pair
            if piece.layout is not None:
                call = request.call(piece, q, pair)
                of_q, *of_pair = ops.backward(call, incoming, 0, request.backend)[:3]
                dq += of_q.view(q.shape)
                dk, dv = (x.view(y.shape) for x, y in zip(of_pair, pair, strict=True))
                grads = dk, dv
                if 0 in piece.distances:
                    add_own(sums, grads, plan, piece)
            if before is not None:
                before.add_to(sums)
            before = Returned(processes, plan, piece, grads)
        assert before is not None
        before.add_to(sums)
        return dq.to(q.dtype), *(x.to(k.dtype) for x in sums), None


def nothing_seen(q: Tensor, v: Tensor) -> Results:
    """Returns the results of queries (B, n, H, D) that see no key."""
    lse = ops.lse_like(q.flatten(0, 1), packed=True)
    return q.new_zeros((lse.shape[1], q.shape[2], v.shape[3])), lse.fill_(-torch.inf), None


def zeros(like: Tensor) -> Tensor:
    """Returns sums to come, in fp32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def add_own(sums: Pair, grads: Pair, plan: Plan, piece: Piece) -> None:
    """Adds the gradients of the keys in a piece that are this process's."""
    own = piece.keys.meet(plan.shard)
    for whole, part in zip(sums, grads, strict=True):
        whole[:, own.since(plan.shard.begin)] += part[:, own.since(piece.keys.begin)]
