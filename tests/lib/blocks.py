"""Packed sequences as the rows of a batch, for plain maths that would otherwise take (T, T).

    blocks = Blocks(owner_q, owner_k)         # (T,): the sequence of each token, below 0 for none
    x = blocks.pairs(scores)                  # (1, H, Tq, Tk) -> (S, H, Nq, Nk)
    blocks.joined({"o": ..., "dk": ...})      # back to (1, H, T, D)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from plain import Terms
from torch import Tensor


class Blocks:
    """Places of tokens: queries (S, Nq) and keys (S, Nk), where T stands for none."""

    def __init__(self, owner_q: Tensor, owner_k: Tensor) -> None:
        self.sizes = len(owner_q), len(owner_k)
        sequences = torch.arange(int(max(owner_q.max(), owner_k.max(), torch.tensor(0))) + 1)
        self.queries, self.keys = (self._places(owner, sequences) for owner in (owner_q, owner_k))

    @staticmethod
    def _places(owner: Tensor, sequences: Tensor) -> Tensor:
        rows = [(owner == s).nonzero()[:, 0] for s in sequences]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(owner))

    @property
    def is_smaller(self) -> bool:
        sequences, nq = self.queries.shape
        return sequences * nq * self.keys.shape[1] < self.sizes[0] * self.sizes[1]

    def rows(self, x: Tensor, of_keys: bool = False) -> Tensor:
        """(1, H, T, D) -> (S, H, N, D), with zeros where a sequence has ended."""
        padded = torch.cat([x[0], torch.zeros_like(x[0][:, :1])], 1)
        return padded[:, self.keys if of_keys else self.queries].transpose(0, 1)

    def pairs(self, x: Tensor) -> Tensor:
        """(1, H, Tq, Tk) -> (S, H, Nq, Nk), with zeros or False beyond the ends."""
        i, j = self.queries[:, :, None], self.keys[:, None, :]
        inside = (i < self.sizes[0]) & (j < self.sizes[1])
        found = x[0][:, i.clamp(max=self.sizes[0] - 1), j.clamp(max=self.sizes[1] - 1)]
        return torch.where(inside, found, torch.zeros_like(found)).transpose(0, 1)

    def terms(self, terms: Terms) -> Terms:
        pieces = {name: (self.pairs(at), self.pairs(by)) for name, (at, by) in terms.pieces.items()}
        keep = None if terms.keep is None else self.pairs(terms.keep)
        return replace(terms, pieces=pieces, keep=keep)

    def joined(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results of a batch in the packed order; tokens of no sequence see nothing."""
        out = {}
        for name, x in results.items():
            places = self.keys if name in ("dk", "dv") else self.queries
            if name not in ("o", "lse", "dq", "dk", "dv"):
                out[name] = x
                continue
            total = self.sizes[name in ("dk", "dv")]
            empty = -torch.inf if name == "lse" else 0.0
            joined = x.new_full((x.shape[1], total + 1, *x.shape[3:]), empty)
            joined[:, places] = x.transpose(0, 1)
            out[name] = joined[None, :, :total]
        return out
