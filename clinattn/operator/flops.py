"""What the ops compute, for torch's FlopCounterMode: loaded with its module, by ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from clinattn.backends.call import AT, Arguments
from clinattn.operator.visibility import visible_pairs


@register_flop_formula(torch.ops.clinattn.attention_forward, get_raw=True)
def forward_flops(*args: Any, **kwargs: Any) -> int:
    """4 D for each visible (query, key) pair of each head: two multiply-adds per element."""
    q = args[0]
    return 4 * q.shape[-1] * q.shape[1] * visible_pairs(Arguments(*args[: len(AT)]))


@register_flop_formula(torch.ops.clinattn.attention_backward, get_raw=True)
def backward_flops(do, dlse, o, lse, lse_low, *args: Any, **kwargs: Any) -> int:
    """10 D for each visible pair: scores again, then do.v, dv, dq and dk."""
    q = args[0]
    return 10 * q.shape[-1] * q.shape[1] * visible_pairs(Arguments(*args[: len(AT)]))
