"""The FLOP of the ops for FlopCounterMode; imported right after torch.utils.flop_counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from clinattn.backends.call import Arguments
from clinattn.operator.visibility import visible_pairs


@register_flop_formula(torch.ops.clinattn.attention_forward, get_raw=True)
def forward_flops(*args: Any, **kwargs: Any) -> int:
    """2 (D + Dv) for each visible (query, key) pair of each head: scores, then their sum with v."""
    *row, _ = args
    call = Arguments(*row)
    return 2 * (call.q.shape[-1] + call.v.shape[-1]) * _pairs(call)


@register_flop_formula(torch.ops.clinattn.attention_backward, get_raw=True)
def backward_flops(do, dlse, o, lse, lse_low, *args: Any, **kwargs: Any) -> int:
    """6 D + 4 Dv for each visible pair: scores again, dq and dk; do.v and dv."""
    *row, _, _ = args
    call = Arguments(*row)
    return (6 * call.q.shape[-1] + 4 * call.v.shape[-1]) * _pairs(call)


def _pairs(call: Arguments) -> int:
    """Returns the number of visible pairs of all heads."""
    return call.q.shape[1] * visible_pairs(call)
