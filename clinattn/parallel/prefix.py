"""A global prefix where sequences are split: which of its keys and queries go where.

The first tokens of a document are few. Their keys are sent to the processes that have later tokens
of the document. Their queries are sent to every process, which attends to its own keys; results
are merged by lse. So a windowed layer with a prefix sends a halo and a few rows more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clinattn.parallel.documents import Documents, Seen
from clinattn.parallel.plan import Layout, Piece, Plan, Range, cu_seqlens, on_device


def unprefixed(documents: Documents, visible: Seen, place: Tensor, prefix: int) -> Seen:
    """Returns what queries see beside prefixes: those of a prefix, nothing."""
    start = documents.start[visible.document]
    later = place >= start + prefix
    return visible._replace(lo=visible.lo.where(later, start), hi=visible.hi.where(later, start))


class PrefixKeys(NamedTuple):
    """The keys of prefixes that a process's queries see: those of others, then some of its own.

    plan: one piece, of the keys of others. own: places (m,) in the shard. layout: of the call to
    both, (B, keys of others + m), None without any.
    """

    plan: Plan
    own: Tensor
    layout: Layout | None


def prefix_keys(
    documents: Documents,
    visible: Seen,
    place: Tensor,
    shards: list[Range],
    rank: int,
    prefix: int,
    device: torch.device,
) -> PrefixKeys:
    """visible: what the queries at `place` see but for the prefix."""
    needs = [_begun_before(documents, shard, prefix) for shard in shards]
    shard, taken = shards[rank], needs[rank]
    local = documents.within(*shard) if shard.length else documents.row[:0].long()
    row, start, end = (x[local] for x in (documents.row, documents.start, documents.end))
    last = torch.minimum(start + prefix, end)
    counts = (last.clamp(*taken) - start.clamp(*taken)) + (last.clamp(*shard) - start.clamp(*shard))
    in_first_row = row == 0
    own = _runs(start[in_first_row].clamp(*shard), last[in_first_row].clamp(*shard))
    plan = Plan(rank, shards, needs, [Piece(taken, range(len(shards)), None)])
    if not counts.sum():
        return PrefixKeys(plan, own.to(device), None)
    cu_q = cu_seqlens(
        row * shard.length + start.clamp(*shard) - shard.begin, documents.rows * shard.length
    )
    cu_k = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    of = visible.document
    most = torch.minimum(documents.start + prefix, documents.keys)[of]
    first = documents.start[of]
    hi = torch.minimum(most, visible.lo) - first
    hi = hi.where(place >= first + prefix, 0).clamp(min=0)
    padding = place >= documents.queries[of]
    hi = hi.where(~padding, (most - first).clamp(min=0))
    interval = hi.where(padding, 0), hi
    return PrefixKeys(plan, (own - shard.begin).to(device), on_device(cu_q, cu_k, interval, device))


def _begun_before(documents: Documents, shard: Range, prefix: int) -> Range:
    """Returns the prefix, before a shard, of the document in which the shard begins."""
    if not shard.length or not documents.rows:
        return Range(shard.begin, shard.begin)
    start = int(documents.start[documents.at(torch.tensor([shard.begin]))[0, 0]])
    return Range(start, min(start + prefix, shard.begin))


def _runs(begins: Tensor, ends: Tensor) -> Tensor:
    """Returns the numbers of the ranges [begin, end), one range after the other."""
    counts = ends - begins
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + torch.repeat_interleave(begins - before, counts)


class PrefixQueries(NamedTuple):
    """The queries of prefixes, whose documents have keys in this process.

    layout: of the call of these queries to the shard's keys, None without any. Those of documents
    that lie in one process are `here`: rows among the queries, and places in the flat shard. Of
    the others, `across` in all processes, this one attends to `seen`: rows among the queries, and
    among those across; and it has `held`: rows among those across, and places in the flat shard.
    own: of all that this process has, rows among the queries, and places in the flat shard.
    """

    layout: Layout | None
    here: tuple[Tensor, Tensor]
    across: int
    seen: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


def prefix_queries(
    documents: Documents, shards: list[Range], rank: int, prefix: int, device: torch.device
) -> PrefixQueries:
    shard = shards[rank]
    last = torch.maximum(
        documents.start, torch.minimum(documents.start + prefix, documents.queries)
    )
    counts = last - documents.start
    ends = torch.tensor([x.end for x in shards])
    first_shard, last_shard = (
        torch.searchsorted(ends, x, right=True) for x in (documents.start, documents.end - 1)
    )
    is_across = (first_shard < last_shard) & (documents.end > documents.start)
    local = torch.zeros_like(is_across)
    if shard.length:
        local[documents.within(*shard)] = True

    def rows(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The document and the place in its row of every query of some documents."""
        start, n = documents.start, counts * chosen
        return torch.repeat_interleave(torch.arange(len(n)), n), _runs(start, start + n)

    def flat(document: Tensor, place: Tensor) -> Tensor:
        return documents.row[document] * shard.length + place - shard.begin

    document, place = rows(local)
    document_across, place_across = rows(is_across)
    held = ((place_across >= shard.begin) & (place_across < shard.end)).nonzero()[:, 0]
    of_across = is_across[document]
    seen_across = local[document_across].nonzero()[:, 0]
    here, seen = (~of_across).nonzero()[:, 0], of_across.nonzero()[:, 0]
    places = flat(document[here], place[here])
    own = ((place >= shard.begin) & (place < shard.end)).nonzero()[:, 0]
    held_places = flat(document_across[held], place_across[held])
    of_call = None
    if len(document):
        chosen = local.nonzero()[:, 0]
        row, start = documents.row[chosen], documents.start[chosen].clamp(*shard)
        n = counts[chosen]
        cu_q = torch.cat((n.new_zeros(1), n.cumsum(0)))
        cu_k = cu_seqlens(row * shard.length + start - shard.begin, documents.rows * shard.length)
        first = documents.start[document].clamp(*shard)
        hi = documents.keys[document].clamp(*shard) - first
        everything = bool((documents.keys == documents.end).all())
        of_call = on_device(cu_q, cu_k, None if everything else (hi * 0, hi), device)

    def sent(*pair: Tensor) -> tuple[Tensor, Tensor]:
        return pair[0].to(device), pair[1].to(device)

    return PrefixQueries(
        of_call, sent(here, places), len(document_across), sent(seen, seen_across),
        sent(held, held_places), sent(own, flat(document[own], place[own])),
    )  # fmt: skip


class Prefix(NamedTuple):
    keys: PrefixKeys
    queries: PrefixQueries
