"""The features that a Case adds to attention: numbers for the package, and as N x N matrices.

The definitions here are the documentation's, pair by pair; nothing is shared with the package.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from cases import Case
from plain import Terms
from slow_philox import keep_mask
from torch import Tensor

SEED = 1234


@dataclasses.dataclass
class TokenPlaces:
    """The sequence of each token and its place in that sequence; the sizes that count.

    owner, at: (batch, tokens), -1 and -2 in the tail of packed rows. start, nk, nq: (sequences,).
    """

    owner_q: Tensor
    owner_k: Tensor
    at_q: Tensor
    at_k: Tensor
    start: Tensor
    nk: Tensor
    nq: Tensor


def positions(lengths: tuple[int, ...], tail: int, tail_owner: int) -> tuple[Tensor, Tensor]:
    """Returns the sequence of each packed token, and the token's index there."""
    owner = [s for s, n in enumerate(lengths) for _ in range(n)] + [tail_owner] * tail
    index = [i for n in lengths for i in range(n)] + list(range(tail))
    return torch.tensor(owner, dtype=torch.long), torch.tensor(index, dtype=torch.long)


def make_layout(case: Case, start: Tensor) -> TokenPlaces:
    """Returns the TokenPlaces. start: the first valid key of each row of the dense layout."""
    given_q, given_k = case.nq, case.nq if case.nk is None else case.nk
    if isinstance(given_q, tuple) and isinstance(given_k, tuple):
        owner_q, i = positions(given_q, case.tail, -1)
        owner_k, j = positions(given_k, case.tail, -2)
        nq, nk = torch.tensor(given_q).long(), torch.tensor(given_k).long()
        rows = (x[None] for x in (owner_q, owner_k, i, j))
        return TokenPlaces(*rows, torch.zeros_like(nq), nk, nq)
    batch = case.batch
    owner = torch.arange(batch)[:, None]
    nq, nk = (
        torch.full((batch,), full) if given is None else torch.tensor(given)
        for full, given in ((given_q, case.q_lengths), (given_k, case.kv_lengths))
    )
    return TokenPlaces(
        owner.expand(batch, given_q),
        owner.expand(batch, given_k),
        torch.arange(given_q).expand(batch, given_q),
        torch.arange(given_k).expand(batch, given_k),
        start,
        nk,
        nq,
    )


class Features:
    def __init__(self, case: Case, layout: TokenPlaces, heads: int, dtype, random, device) -> None:
        self.case, self.layout, self.heads, self.random = case, layout, heads, random
        self.device = device  # of the generator that the seed of dropout comes from
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.keywords: dict[str, object] = {}
        self.parameters: dict[str, Tensor] = {}
        self.gaps = None
        for name, value in (("softcap", case.softcap), ("dropout_p", case.dropout)):
            if value is not None:
                self.keywords[name] = value
        if case.global_prefix:
            self.keywords["global_prefix"] = case.global_prefix
        if case.time_window is not None:
            self.keywords["time_window"] = case.time_window
        sequences = len(layout.nq)
        if case.segments:
            self.ids = self.draw_segments(case.segments)
            self.keywords["segment_ids"] = self.ids
        if case.times:
            self.times = self.draw_times(case.times)
            self.keywords["times"] = self.times[0] if case.packed else self.times
            self.gaps = self.time_gaps(self.dtype)
        if case.time_decay:
            self.parameter("decay", "time_decay", torch.rand(heads, generator=random) / 4)
        if case.alibi:
            shape = (heads,) if case.alibi == "h" else (sequences, heads)
            self.parameter("slopes", "alibi_slopes", torch.rand(shape, generator=random) / 4)
        if case.relative is not None:
            table = torch.randn(heads, 2 * case.relative + 1, generator=random)
            self.parameter("relative", "relative_bias", table)

    def parameter(self, name: str, keyword: str, x: Tensor) -> None:
        self.parameters[name] = x.to(self.dtype)
        self.keywords[keyword] = self.parameters[name]

    @property
    def padding(self) -> Tensor:
        """True (batch, tokens) beyond the shorter of a row's two lengths."""
        nq, nk = self.layout.nq, self.layout.nk
        return self.layout.at_q >= torch.minimum(nq, nk)[self.layout.owner_q.clamp(min=0)]

    def draw_segments(self, count: int) -> Tensor:
        ids = torch.randint(-2, count - 2, self.layout.at_q.shape, generator=self.random)
        ids = ids.sort(1)[0]
        garbage = torch.randint(-99, 99, ids.shape, generator=self.random)
        return torch.where(self.padding, garbage, ids)

    def draw_times(self, name: str) -> Tensor:
        """Draws quarters of hours, many equal, late enough that fp32 would not hold them."""
        dtype = getattr(torch, name)
        base = {"float32": 4096.0, "float64": 5e7, "int64": 10**12}[name]
        t = torch.randint(0, 160, self.layout.at_q.shape, generator=self.random)
        out = torch.empty(t.shape, dtype=dtype)
        for b in range(t.shape[0]):
            for s in self.layout.owner_q[b].unique().tolist():
                rows = self.layout.owner_q[b] == s
                since = t[b, rows].sort()[0]
                out[b, rows] = (since if name == "int64" else since / 4).to(dtype) + base
        garbage = -7 if name == "int64" else math.nan
        return torch.where(self.padding | (self.layout.owner_q < 0), garbage, out)

    def time_gaps(self, dtype) -> Tensor:
        """Returns |t_i - t_j| (batch, 1, nq, nk) of times less the first valid one, in a dtype."""
        since = torch.zeros(self.times.shape, dtype=dtype)
        for b in range(since.shape[0]):
            for s in self.layout.owner_q[b].unique().tolist():
                rows = (self.layout.owner_q[b] == s) & ~self.padding[b]
                if s >= 0 and rows.any():
                    first = min(int(self.layout.start[s]), int(rows.sum()) - 1)
                    since[b, rows] = (self.times[b, rows] - self.times[b, rows][first]).to(dtype)
        return (since[:, None, :, None] - since[:, None, None, :]).abs()

    def visible(self, inside: Tensor) -> Tensor:
        """Returns pairs seen within a sequence. inside: those of windows, (batch, 1, nq, nk)."""
        case, at = self.case, self.layout
        owner = at.owner_q.clamp(min=0)
        nq, nk = at.nq, at.nk
        if case.segments or case.times:
            nq = nk = torch.minimum(nq, nk)
        seen = inside
        if case.segments:
            seen = seen & (self.ids[:, None, :, None] == self.ids[:, None, None, :])
        if case.time_window is not None:
            seen = seen & (self.time_gaps(torch.float32) <= case.time_window)
        i, j = at.at_q[:, None, :, None], at.at_k[:, None, None, :]
        start = at.start[owner][:, None, :, None]
        seen = seen & (j >= start)
        if case.global_prefix:
            seen = seen | (j < start + case.global_prefix) | (i < start + case.global_prefix)
        same = at.owner_q[:, None, :, None] == at.owner_k[:, None, None, :]
        valid = (i < nq[owner][:, None, :, None]) & (j < nk[owner][:, None, :, None])
        return seen & same & valid & (j >= start)

    def terms(self, bias: Tensor | None) -> Terms:
        """Returns the Terms. bias: that of a mask with a gradient."""
        at, batch = self.layout, len(self.layout.at_q)
        full = (batch, self.heads, at.at_q.shape[1], at.at_k.shape[1])
        ahead = at.at_k[:, None, None, :] - at.at_q[:, None, :, None]
        element = {
            name: torch.arange(x.numel()).view(x.shape) for name, x in self.parameters.items()
        }
        one = torch.ones(())
        pieces: dict[str, tuple[Tensor, Tensor]] = {}
        if bias is not None:
            self.parameters = {"mask": bias, **self.parameters}
            pieces["mask"] = torch.arange(bias.numel()).view(bias.shape), one
        if "decay" in element:
            pieces["decay"] = element["decay"][:, None, None], -self.gaps
        if "slopes" in element:
            slopes = element["slopes"].expand(len(at.nq), self.heads)
            of_query = slopes[at.owner_q.clamp(min=0)]  # (batch, nq, heads)
            pieces["slopes"] = of_query.mT[..., None], -ahead.abs()
        if "relative" in element:
            far = element["relative"].shape[1] // 2
            places = element["relative"][:, ahead[:, 0].clamp(-far, far) + far]
            pieces["relative"] = places.transpose(0, 1), one
        expanded = {name: (at.expand(full), by.expand(full)) for name, (at, by) in pieces.items()}
        keep = self.keep() if self.case.dropout else None
        dropout_p = self.case.dropout or 0.0
        return Terms(self.case.softcap or 0.0, expanded, keep, dropout_p, self.parameters)

    def keep(self) -> Tensor:
        torch.manual_seed(SEED)
        seed = int(torch.randint(0, 1 << 62, (1,), device=self.device))
        at = self.layout
        masks = []
        for b in range(at.owner_q.shape[0]):
            if not self.case.packed:
                sizes = range(at.at_q.shape[1]), range(at.at_k.shape[1])
                masks.append(keep_mask(seed, self.case.dropout, [b], self.heads, *sizes))
                continue
            whole = torch.ones(1, self.heads, at.at_q.shape[1], at.at_k.shape[1], dtype=torch.bool)
            for s in range(len(at.nq)):
                rows, columns = at.owner_q[0] == s, at.owner_k[0] == s
                sizes = range(int(rows.sum())), range(int(columns.sum()))
                if rows.any() and columns.any():
                    block = keep_mask(seed, self.case.dropout, [s], self.heads, *sizes)
                    whole[:, :, rows.nonzero(), columns.nonzero().T] = block
            masks.append(whole)
        return torch.cat(masks)
