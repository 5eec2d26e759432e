"""Backward attention: dQ (and delta) by query tiles, then dK and dV by key tiles. No atomics."""

from typing import Any

import torch

from .configs import tile_config
from .dbias import mask_gradient, relative_gradient
from .dkdv import dkdv_kernel
from .dq import dq_kernel
from .launch import KernelProblem, empty_like

# Bits of `needs`, as in NEEDS of clinattn.backends.call.
MASK, DECAY, SLOPES, RELATIVE = 1, 2, 4, 8


def attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor | None,
    call: Any,
    needs: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Returns (dq, dk, dv, dmask, ddecay, dslopes, drelative) of attention_forward(call).

    All are contiguous. do, dlse: the gradients of its outputs o and lse; dlse can be None. lse_low:
    None for zeros. needs: the bits of NEEDS in backends.call; of the last four results those
    whose bit is not set are empty.
    """
    if do.stride(-1) != 1:
        do = do.contiguous()
    o, lse = o.contiguous(), lse.contiguous()
    problem = KernelProblem(call, others=(do,))
    layout = problem.layout
    lse_low = torch.zeros_like(lse) if lse_low is None else lse_low.contiguous()
    dq, dk, dv = empty_like(call.q), empty_like(call.k), empty_like(call.v)
    shift, delta = empty_like(lse), empty_like(lse)
    of_decay = problem.empty_lse() if needs & DECAY else None
    of_slopes = problem.empty_lse() if needs & SLOPES else None
    gradient: dict[str, Any] = dict(
        do_ptr=do,
        shift_ptr=shift,
        lse_low_ptr=lse_low,
        delta_ptr=delta,
        do_strides=layout.do_strides,
    )
    if dq.numel() > 0:
        config = tile_config("dq", *layout.config_key)
        num_tiles = layout.num_query_tiles(config.block_m)
        problem.launch(
            dq_kernel,
            config,
            num_tiles,
            layout.num_heads,
            o_ptr=o,
            lse_ptr=lse,
            dq_ptr=dq,
            dlse_ptr=None if dlse is None else dlse.contiguous(),
            dslope_ptr=of_slopes,
            ddecay_ptr=of_decay,
            o_strides=layout.o_strides,
            dq_strides=layout.dq_strides,
            ANCHORED=layout.anchors_queries,
            **gradient,
        )
    if dk.numel() > 0:
        config = tile_config("dkdv", *layout.config_key)
        num_tiles = layout.num_key_tiles(config.block_n)
        problem.launch(
            dkdv_kernel,
            config,
            num_tiles,
            layout.num_kv_heads,
            lse_ptr=lse,
            dk_ptr=dk,
            dv_ptr=dv,
            dk_strides=layout.dk_strides,
            dv_strides=layout.dv_strides,
            ANCHORED=layout.anchored,
            **gradient,
        )
    empty = dq.new_empty(0)
    return (
        dq.neg_() if problem.negative else dq,
        dk,
        dv,
        mask_gradient(problem, gradient) if needs & MASK else empty,
        empty if of_decay is None else -sum_over_rows(of_decay),
        empty if of_slopes is None else -slope_gradient(of_slopes, call),
        relative_gradient(problem, gradient) if needs & RELATIVE else empty,
    )


def sum_over_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns the sums (H,) of x, which is shaped like lse."""
    return x.sum(-1) if x.dim() == 2 else x.sum((0, 2))


def slope_gradient(x: torch.Tensor, call: Any) -> torch.Tensor:
    """Returns the sums of x, shaped like lse, over the rows of a slope: (1, H), or (B, H)."""
    if len(call.slopes) == 1:
        return sum_over_rows(x)[None]
    if call.cu_seqlens_q is None:
        return x.sum(-1)
    sums = torch.nn.functional.pad(x.double().cumsum(-1), (1, 0))[:, call.cu_seqlens_q.long()]
    return sums.diff(dim=-1).T.to(x.dtype).contiguous()
