"""Launches the forward pass in Gluon: the calls that it serves, and how a card shares the work."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import forward_gluon_kernel, relaunch
from .forward_gluon_records import GluonForm
from .launch import KernelProblem

ROWS = 64  # queries of a consumer, the rows of a product of one warp group


class Schedule(NamedTuple):
    """The spread of a call over programs and warp groups; only block_n changes bits of a result.

    consumers: 2 or 3, of 64 queries each. stages: tiles of K, and of V, in shared memory.
    turns: consumers issue their products in turns. persistent: a program for each multiprocessor,
    which goes from one query tile to the next; else one for each tile, or pair of tiles.
    pairs: with a causal bound, a tile of many keys and one of few are one work item.
    """

    consumers: int
    block_n: int = 128
    stages: int = 2
    turns: bool = False
    persistent: bool = True
    pairs: bool = True


# TFLOP/s on an H200, 2026-11-27, bf16, batch 2, N 8192, full and causal. D 128: 645 and 612, with
# turns 632 and 608, with one tile for a program 610 and 558; cuDNN 609 and 515. D 64: 443 and 392,
# 465 and 402, 453 and 430; cuDNN 457 and 427, and forward.py, which serves D 64, 454 and 428.
# Three consumers leave a thread 160 registers: Triton 3.6 spills up to 40 bytes, Triton 3.9 80 to
# 224.
SCHEDULES = {64: Schedule(3), 128: Schedule(2)}
SWIZZLED = gl.NVMMASharedLayout(128, 16, 4)
# Other schedules that were timed, each as a change of the shipped one.
VARIANTS: dict[str, dict[str, Any]] = {
    "turns": {"turns": True},
    "one-tile": {"persistent": False, "pairs": False},
    "one-tile-turns": {"persistent": False, "pairs": False, "turns": True},
    "two-consumers": {"consumers": 2},
}


def attention_forward_gluon(
    call: Any, schedule: Schedule | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse) of dense attention, full or causal, on a card of capability 9.0.

    call has the fields of backends.call.Arguments: q (B, H, Nq, D), k and v (B, Hkv, Nk, D),
    bf16 or fp16, D 64 or 128, scale and the causal bound. o has q's type and shape, lse is fp32
    (B, H, Nq), natural log; a query that sees no key gives 0 and -inf, and lse is NaN for the rows
    that are left to forward.py. schedule: that of SCHEDULES by default. Raises NotImplementedError
    for what else a call can hold, and for strides or addresses that are no multiple of 16 bytes.
    """
    reason = unsupported(call)
    if reason is not None:
        raise NotImplementedError(reason)
    return launch_forward(KernelProblem(call), schedule)


def launch_forward(
    problem: KernelProblem, schedule: Schedule | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse) as attention_forward_gluon, for a call that is not `unsupported`."""
    call, layout = problem.call, problem.layout
    o = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    lse = problem.empty_lse()
    if o.numel() == 0:
        return o, lse
    if schedule is None:
        schedule = SCHEDULES[layout.head_dim]
    causal = call.window_right == 0
    pairs = schedule.pairs and causal
    num_tiles = -(-layout.seqlen_q // (ROWS * schedule.consumers))
    num_items = (-(-num_tiles // 2) if pairs else num_tiles) * layout.num_heads * layout.batch
    programs = num_items
    if schedule.persistent:
        programs = min(num_items, multiprocessors(problem.device))
    descriptors = {
        "q_desc": descriptor(call.q, ROWS),
        "k_desc": descriptor(call.k, schedule.block_n),
        "v_desc": descriptor(call.v, schedule.block_n),
    }
    outputs = {"o_ptr": o, "lse_ptr": lse}
    with problem.on_device():
        key = (schedule, programs)
        for plan in layout.plans.get(key, ()):
            if plan.again((), outputs, descriptors):
                return o, lse
        form = GluonForm(
            GROUP=layout.form.GROUP,
            CAUSAL=causal,
            PAIRS=pairs,
            TURNS=schedule.turns,
            CONSUMERS=schedule.consumers,
            ROWS=ROWS,
            HEAD_DIM=layout.head_dim,
            BLOCK_N=schedule.block_n,
            STAGES=schedule.stages,
        )
        fixed = dict(
            o_strides=layout.o_strides,
            num_items=num_items,
            num_tiles=num_tiles,
            num_heads=layout.num_heads,
            seqlen_q=layout.seqlen_q,
            seqlen_k=layout.seqlen_k,
            offset=layout.seqlen_k - layout.seqlen_q if call.bottom_right else 0,
            scale=layout.factors.qk_scale,
            form=form,
            num_warps=4,
            enable_fp_fusion=False,  # as in forward.py, which gives the same bits
        )
        kernel = forward_gluon_kernel.forward_kernel
        made = relaunch.launch(kernel, programs, (), outputs, fixed, descriptors=descriptors)
        relaunch.keep(layout.plans, key, made)
    return o, lse


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Returns the multiprocessors of a card; those of an H100 for a machine without a card."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Returns a descriptor that copies `rows` rows of a head of x (B, H, N, D), zeros past N."""
    block = [1, 1, rows, x.shape[-1]]
    # The stride of a dimension of size 1 can be any number.
    strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], block, SWIZZLED)


# Fields of a call, besides q, k and v, that need not hold their defaults.
SERVED = ("scale", "window_left", "window_right", "bottom_right", "max_seqlen_q", "max_seqlen_k")


def unsupported(call: Any) -> str | None:
    """Returns the reason why attention_forward_gluon does not take a call, or None."""
    for name, default in call._field_defaults.items():
        value = getattr(call, name)
        if name not in SERVED and value is not default and (default is None or value != default):
            return f"{name} is not supported"
    if call.window_left >= 0 or call.window_right > 0:
        return f"the window ({call.window_left}, {call.window_right}) is not supported"
    q, k, v = call.q, call.k, call.v
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, and bfloat16 or float16 is supported"
    if q.shape[-1] not in SCHEDULES or v.shape[-1] != q.shape[-1]:
        return f"head dims are {q.shape[-1]} and {v.shape[-1]}, and 64 or 128 is supported"
    if k.shape[2] == 0:
        return "there are no keys"
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
        if x.data_ptr() % 16 or any(s <= 0 or s % 8 for s in strides):
            return f"{name} has strides {x.stride()}, which the copy engine does not take"
    return None
