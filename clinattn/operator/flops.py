"""The FLOP of the ops for FlopCounterMode; imported right after torch.utils.flop_counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from clinattn.backends.call import Arguments
from clinattn.operator.visibility import visible_pairs


@register_flop_formula(torch.ops.clinattn.attention_forward, get_raw=True)
def forward_flops(*args: Any, **kwargs: Any) -> int:
    """4 D for each visible (query, key) pair of each head: two multiply-adds per element."""
    *row, _ = args
    return 4 * _pair_elements(Arguments(*row))


@register_flop_formula(torch.ops.clinattn.attention_backward, get_raw=True)
def backward_flops(do, dlse, o, lse, lse_low, *args: Any, **kwargs: Any) -> int:
    """10 D for each visible pair: scores again, then do.v, dv, dq and dk."""
    *row, _, _ = args
    return 10 * _pair_elements(Arguments(*row))


def _pair_elements(call: Arguments) -> int:
    """Returns the number of visible pairs of all heads, times D."""
    return call.q.shape[-1] * call.q.shape[1] * visible_pairs(call)
