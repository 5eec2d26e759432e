"""Attention to the keys of a global prefix and of its queries, and the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clinattn.backends.call import Incoming
from clinattn.parallel.keys import Collected, Pair, Returned
from clinattn.parallel.merging import Results, exact, nothing_seen, rounded
from clinattn.parallel.prefix import PrefixKeys, PrefixQueries
from clinattn.parallel.processes import Processes
from clinattn.parallel.request import Request


def keys_of(request: Request, keys: PrefixKeys, own: Pair) -> Pair:
    """Returns the keys and values of the prefixes that this process's queries see, flat."""
    collected = Collected(request.processes, keys.plan, keys.plan.pieces[0], own)
    k, v = (
        torch.cat((others, mine.index_select(1, keys.own)), 1).flatten(0, 1)
        for others, mine in zip(collected.pair(), own, strict=True)
    )
    return k, v


def keys_forward(request: Request, keys: PrefixKeys, q: Tensor, own: Pair) -> Results | None:
    """Returns the results of q (T, H, D) for the keys of prefixes alone."""
    pair = keys_of(request, keys, own)
    return None if keys.layout is None else request.forward(keys.layout, q, *pair)


def keys_backward(
    request: Request, keys: PrefixKeys, q: Tensor, own: Pair, incoming: Incoming, sums: Pair
) -> Tensor | None:
    """Returns the share of dq (T, H, D); adds those of dk and dv to the sums of their owners."""
    pair = keys_of(request, keys, own)
    piece, dq = keys.plan.pieces[0], None
    grads = own[0][:, :0], own[1][:, :0]
    if keys.layout is not None:
        dq, *of_pair = request.backward(keys.layout, q, *pair, incoming)
        rows, others = len(own[0]), piece.keys.length
        dk, dv = (x.unflatten(0, (rows, -1)) for x in of_pair)
        for whole, x in zip(sums, (dk, dv), strict=True):
            whole[:, keys.own] += x[:, others:]
        grads = dk[:, :others], dv[:, :others]
    Returned(request.processes, keys.plan, piece, grads).add_to(sums)
    return dq


def queries_forward(
    request: Request, queries: PrefixQueries, q: Tensor, own: Pair
) -> tuple[Tensor, Results]:
    """Returns the queries of prefixes that have keys here, of q (T, H, D), and their results."""
    rows = taken(queries, request.processes, q)
    k, v = (x.flatten(0, 1) for x in own)
    results = nothing_seen(rows, v)
    if queries.layout is not None:
        results = request.forward(queries.layout, rows, k, v)
    return rows, merged(queries, request.processes, results)


def put(queries: PrefixQueries, results: Results, into: Results) -> Results:
    """Returns the results of a process's tokens, with those of its prefixes in their places."""
    o, lse, lse_low = into
    lse_low = torch.zeros_like(lse) if lse_low is None else lse_low
    found, found_lse, found_low = results
    assert found_low is not None
    rows, places = queries.own
    o[places] = found[rows]
    lse[:, places], lse_low[:, places] = found_lse[:, rows], found_low[:, rows]
    return o, lse, lse_low


def queries_backward(
    request: Request,
    queries: PrefixQueries,
    saved: Sequence[Tensor],
    own: Pair,
    incoming: Incoming,
    sums: Pair,
) -> Tensor:
    """Returns the share of dq (T, H, D) in fp32 at least; adds those of dk and dv to the sums.

    saved: what queries_forward returned. incoming: of this process's tokens.
    """
    rows, *of_rows = saved
    processes = request.processes
    do = taken(queries, processes, incoming.do)
    dlse = None
    if incoming.dlse is not None:
        dlse = taken(queries, processes, incoming.dlse.t()).t()
    dq = rows.new_zeros((len(incoming.do), *rows.shape[1:]), dtype=sums[0].dtype)
    of_q = torch.zeros_like(rows)
    if queries.layout is not None:
        k, v = (x.flatten(0, 1) for x in own)
        of_q, *of_pair = request.backward(queries.layout, rows, k, v, Incoming(do, dlse, *of_rows))
        for whole, x in zip(sums, of_pair, strict=True):
            whole += x.view(whole.shape)
    dq[queries.here[1]] = of_q[queries.here[0]].to(dq.dtype)
    if queries.across:
        across = dq.new_zeros((queries.across, *dq.shape[1:]))
        across[queries.seen[1]] = of_q[queries.seen[0]].to(dq.dtype)
        dq[queries.held[1]] = processes.summed(across)[queries.held[0]]
    return dq


def taken(queries: PrefixQueries, processes: Processes, flat: Tensor) -> Tensor:
    """Returns the rows of a flat (T, ...) that are attended here, those across from everywhere."""
    rows = flat.new_empty((len(queries.here[0]) + len(queries.seen[0]), *flat.shape[1:]))
    rows[queries.here[0]] = flat[queries.here[1]]
    if queries.across:
        wide = torch.promote_types(flat.dtype, torch.float32)
        across = flat.new_zeros((queries.across, *flat.shape[1:]), dtype=wide)
        across[queries.held[0]] = flat[queries.held[1]].to(wide)
        across = processes.summed(across)
        rows[queries.seen[0]] = across[queries.seen[1]].to(flat.dtype)
    return rows


def merged(queries: PrefixQueries, processes: Processes, results: Results) -> Results:
    """Returns results of which those across are merged over all processes."""
    o, lse, lse_low = results
    lse_low = torch.zeros_like(lse) if lse_low is None else lse_low
    if not queries.across:
        return o, lse, lse_low
    at, among = queries.seen
    part = lse.new_full((len(lse), queries.across), -torch.inf, dtype=torch.float64)
    part[:, among] = exact(lse, lse_low)[:, at]
    most = processes.largest(part.clone())
    weight = torch.exp(part - most.where(most != -torch.inf, 0))
    sums = o.new_zeros((queries.across, len(lse), o.shape[-1] + 1), dtype=torch.float64)
    sums[among, :, :-1] = o[at].double()
    sums[..., -1] = 1
    sums = processes.summed(sums * weight.t()[..., None])
    total = sums[..., -1]
    whole = most + total.t().log()
    o[at] = (sums[..., :-1] / total.where(total != 0, 1)[..., None])[among].to(o.dtype)
    lse[:, at], lse_low[:, at] = rounded(whole[:, among], lse.dtype)
    return o, lse, lse_low
