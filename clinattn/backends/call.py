"""The arguments that the ops share, named once: their schema and order follow from this class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SymInt = int | torch.SymInt


class Arguments(NamedTuple):
    """One attention call, as every backend gets it.

    Dense: q (B, H, Nq, D), k and v (B, Hkv, Nk, D). Packed: q (Tq, H, D), k and v (Tk, Hkv, D),
    cu_seqlens int32 (S + 1,). mask: 4-D, bool or floating, size 1 where it broadcasts.
    q_lengths, kv_start, kv_end: int32 (B,), dense only.
    lo, hi: int32, (B, Nq) or (Tq,), both or neither: query i only sees the keys lo_i <= j < hi_i,
    counted within its sequence; neither decreases along the valid queries of a sequence.
    times: (B, N) or (T,), origin subtracted, only with decay (H,). slopes: (1 or B, H). relative:
    (H, 2 L + 1), added at clamp(j - i, -L, L). All four in the dtype of lse.
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
    scale: float = 1.0
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    max_seqlen_q: SymInt = 0
    max_seqlen_k: SymInt = 0
    softcap: float = 0.0
    global_prefix: int = 0
    dropout_p: float = 0.0


# NamedTuple keeps the annotations of this file, which are strings, as ForwardRef.
TYPES = {name: ref.__forward_arg__ for name, ref in Arguments.__annotations__.items()}
SCHEMA = ", ".join(
    f"{annotation.replace(' | None', '?')} {name}" for name, annotation in TYPES.items()
)
TENSORS = tuple(name for name, annotation in TYPES.items() if annotation.startswith("Tensor"))
AT = {name: at for at, name in enumerate(TYPES)}

# Inputs besides q, k and v that have a gradient, with their bit in `needs` of the backward ops.
NEEDS = {"mask": 1, "decay": 2, "slopes": 4, "relative": 8}
