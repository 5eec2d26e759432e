"""The request of a call beside q, k and v, and the op's two passes with it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from clinattn.backends.call import Incoming
from clinattn.operator import ops
from clinattn.parallel.merging import Results
from clinattn.parallel.plan import Layout, Plan
from clinattn.parallel.prefix import Prefix
from clinattn.parallel.processes import Processes


class Request(NamedTuple):
    """keeps: whether the backward pass has the received keys at hand; else they are sent again."""

    processes: Processes
    plan: Plan
    prefix: Prefix | None
    scale: float
    softcap: float
    backend: str
    keeps: bool

    def forward(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Results:
        """Returns o, lse and lse_low of flat q (Tq, H, D), k and v (Tk, Hkv, D or Dv)."""
        call = layout.call(q, k, v, self.scale, self.softcap)
        o, lse, lse_low = ops.forward(call, self.backend)
        return o, lse, lse_low

    def backward(
        self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, incoming: Incoming
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk and dv of these keys, where incoming is of all keys."""
        call = layout.call(q, k, v, self.scale, self.softcap)
        dq, dk, dv = ops.backward(call, incoming, 0, self.backend)[:3]
        return dq, dk, dv
