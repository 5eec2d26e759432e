"""Backward attention: dQ (and delta) by query tiles, then dK and dV by key tiles. No atomics."""

import torch

from .configs import tile_config
from .dkdv import dkdv_kernel
from .dq import dq_kernel
from .launch import Problem


def attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    q_lengths: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of attention_forward with respect to q, k and v, contiguous, in their types.

    do and dlse are the gradients of its outputs o and lse; dlse can be None.
    """
    negative = scale < 0
    if negative:
        q, scale = -q, -scale
    if do.stride(-1) != 1:
        do = do.contiguous()
    o, lse = o.contiguous(), lse.contiguous()
    problem = Problem(
        q, k, v, mask, cu_seqlens_q, cu_seqlens_k, q_lengths, kv_start, kv_end,
        scale, window_left, window_right, bottom_right, others=(do,),
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shift, delta = problem.empty_lse(), problem.empty_lse()
    gradient = dict(
        do_ptr=do,
        shift_ptr=shift,
        delta_ptr=delta,
        scale=scale,
        **problem.stride_arguments("do", do),
    )
    if dq.numel() > 0:
        config = tile_config("dq", *problem.config_key)
        num_tiles = problem.num_tiles(problem.seqlen_q, config.block_m)
        problem.launch(
            dq_kernel,
            config,
            num_tiles,
            problem.num_heads,
            o_ptr=o,
            lse_ptr=lse,
            dq_ptr=dq,
            dlse_ptr=None if dlse is None else dlse.contiguous(),
            **gradient,
            **problem.stride_arguments("o", o),
        )
    if dk.numel() > 0:
        config = tile_config("dkdv", *problem.config_key)
        num_tiles = problem.num_tiles(problem.seqlen_k, config.block_n)
        if kv_start is not None:
            num_tiles += 1  # tiles start at kv_start, and one more covers what lies before it
        problem.launch(
            dkdv_kernel,
            config,
            num_tiles,
            problem.num_kv_heads,
            dk_ptr=dk,
            dv_ptr=dv,
            ANCHORED=problem.anchored,
            **gradient,
            **problem.stride_arguments("dk", dk),
        )
    return dq.neg_() if negative else dq, dk, dv
