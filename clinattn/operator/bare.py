"""The bare call: q, k, v (B, H, N, D) on the CPU, causal order, a scale, and nothing else.

Short sequences cost more on the host than in the kernels. This is the shortest way there: a few
questions, then an op of few arguments. Whatever is out of the ordinary goes the long way, through
functions.py, to the same kernels and the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from clinattn.backends.call import Arguments
from clinattn.backends.cpu import matmul_precision
from clinattn.backends.select import prefers_cpu
from clinattn.operator import functions, listeners, ranges
from clinattn.operator.autograd import op_is_watched

# The overload's own callable; the overload takes 0.2 us to call it.
OUTPUT = torch.ops.clinattn.cpu_bare_output.default._op
FORWARD = torch.ops.clinattn.cpu_bare_forward.default._op
BACKWARD = torch.ops.clinattn.cpu_bare_backward.default._op
LARGEST_SCALE = 1e30  # every dtype takes these; larger ones are looked at by checks.check_scale


def attend(query: Any, key: Any, value: Any, is_causal: bool, scale: float | None) -> Tensor | None:
    """Returns o, or None for a call that is not a bare one; arguments need not be checked."""
    if (
        op_is_watched(query, key, value)
        or not query.is_cpu
        or _is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or ranges.on
        or listeners.on
        or type(is_causal) is not bool
        or not (scale is None or (type(scale) is float and abs(scale) < LARGEST_SCALE))
        or not prefers_cpu()
    ):
        return None
    try:
        if torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad
        ):
            alive = unwrap_if_dead(query), unwrap_if_dead(key), unwrap_if_dead(value)
            return APPLY(*alive, is_causal, scale)
        return OUTPUT(query, key, value, is_causal, scale, matmul_precision())
    except RuntimeError:  # the op refuses other shapes, strides and dtypes
        return None


class BareAttention(torch.autograd.Function):
    """A bare call with its gradients, for first derivatives; others go the long way."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
    ) -> Tensor:
        results = FORWARD(query, key, value, is_causal, scale, matmul_precision())
        ctx.save_for_backward(query, key, value, *results)
        ctx.words = is_causal, scale
        return results[0]

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        query, key, value, o, lse, lse_low = ctx.saved_tensors
        is_causal, scale = ctx.words
        if torch.is_grad_enabled() or op_is_watched(query, key, do) or ranges.on:
            call = Arguments(
                query,
                key,
                value,
                scale=query.shape[3] ** -0.5 if scale is None else scale,
                window_right=0 if is_causal else -1,
                max_seqlen_q=query.shape[2],
                max_seqlen_k=key.shape[2],
            )
            grads = functions.gradients(call, do, None, (o, lse, lse_low), 0, "")
            return *grads[:3], None, None
        dq, dk, dv = BACKWARD(
            do, o, lse, lse_low, query, key, value, is_causal, scale, matmul_precision()
        )
        return dq, dk, dv, None, None


# Function.apply without its part for functorch transforms
APPLY = super(torch.autograd.Function, BareAttention).apply
