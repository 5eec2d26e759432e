"""The records of a call and its passes; the schemas of the ops are made from their fields."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SymInt = int | torch.SymInt

MAX_HEAD_DIM = 256  # of the fused kernels


class Arguments(NamedTuple):
    """Arguments of one attention call, as every backend gets them.

    Dense: q (B, H, Nq, D), k and v (B, Hkv, Nk, D or Dv). Packed: q (Tq, H, D), k and v (Tk, Hkv,
    D or Dv), cu_seqlens int32 (S + 1,). o has the width of v. mask: 4-D, bool or floating, size 1
    where it broadcasts.
    q_lengths, kv_start, kv_end: int32 (B,), dense only.
    lo, hi: int32, (B, Nq) or (Tq,), both or neither: query i sees only the keys lo_i <= j < hi_i,
    counted within its sequence. Neither decreases along the valid queries of a sequence.
    times: (B, N) or (T,), origin subtracted, only with decay (H,). slopes: (1 or B, H). relative:
    (H, 2 L + 1), added at clamp(j - i, -L, L). These four have the dtype of lse.
    seed: int64 (1,), only with dropout_p > 0. softcap and global_prefix: 0 for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    q_lengths: Tensor | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    times: Tensor | None = None
    decay: Tensor | None = None
    slopes: Tensor | None = None
    relative: Tensor | None = None
    seed: Tensor | None = None
    # Defaults of floats are ints: torch.compile(dynamic=True) makes a symbol of 0.0, not of 0, and
    # loses it between one Function and the next.
    scale: float = 1
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    max_seqlen_q: SymInt = 0
    max_seqlen_k: SymInt = 0
    softcap: float = 0
    global_prefix: int = 0
    dropout_p: float = 0

    def is_plain(self) -> bool:
        """Returns whether there is no softcap, no dropout and no added term except a mask."""
        return self.decay is self.slopes is self.relative is self.seed is None and not self.softcap

    def has_added_terms(self) -> bool:
        """Returns whether scores have a term besides a mask."""
        return any(x is not None for x in (self.decay, self.slopes, self.relative))

    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def tensors(self) -> tuple[Any, ...]:
        """Returns the fields that hold tensors; they come first."""
        return self[: len(TENSORS)]

    def scalars(self) -> tuple[Any, ...]:
        return self[len(TENSORS) :]


class Incoming(NamedTuple):
    """Inputs of a backward pass beside the call: gradients of o and lse, and the forward's results.

    lse_low is the part of lse that rounding took away, None where it is 0. Without it 2^(s - lse)
    for scores of 1e4 would be off by the rounding of lse, 5e-4 in fp32.
    """

    do: Tensor
    dlse: Tensor | None
    o: Tensor
    lse: Tensor
    lse_low: Tensor | None


class Summary(NamedTuple):
    """Inputs of a summary of the weights p of a call, beside the call, which has no dropout.

    lse, lse_low: the forward's results, lse_low None for zeros. weights: of the queries, laid out
    as lse, in sums over them; None for ones. A query of weight 0 is not read. do: as o, where dp =
    do v' is asked for. All are contiguous, do by rows.
    """

    lse: Tensor
    lse_low: Tensor | None
    weights: Tensor | None
    do: Tensor | None


class Gradients(NamedTuple):
    """Gradients of a call, or cotangents of them, in the order of the results of the ops."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    decay: Tensor | None
    slopes: Tensor | None
    relative: Tensor | None


def types_of(row: Any) -> dict[str, str]:
    """Returns the annotations of a NamedTuple by field; it keeps strings as ForwardRef."""
    return {name: ref.__forward_arg__ for name, ref in row.__annotations__.items()}


def schema_of(row: Any) -> str:
    """Returns the fields of a NamedTuple as parameters of an op's schema."""
    types = types_of(row).items()
    return ", ".join(f"{annotation.replace(' | None', '?')} {name}" for name, annotation in types)


TENSORS = tuple(
    name for name, annotation in types_of(Arguments).items() if annotation.startswith("Tensor")
)

# The numbers of a call, and those of them that a plain call does not have: all from softcap on.
SCALARS = Arguments._fields[len(TENSORS) :]
FEATURE_SCALARS = SCALARS[SCALARS.index("softcap") :]

# Reductions of the weights p of all pairs, with w the weights of the queries. Sums over the queries
# for each key, laid out as lse is with keys in place of queries: of w p, w p dp and w max(p dp, 0).
RECEIVED, GRADIENT, RELEVANCE = range(3)
# Numbers for each query, laid out as lse: the entropy of its weights in nats, the largest, and the
# `top` largest in a last dimension, with the places of their keys (int64, -1 for a weight of 0) in
# the sequence. Of equal weights the one of the first key comes first.
ENTROPY, MAX, TOPK = range(3, 6)
MAX_TOP = 16

# Inputs besides q, k and v that have a gradient, with their bit in `needs` of the backward ops.
NEEDS = {"mask": 1, "decay": 2, "slopes": 4, "relative": 8}
