"""Rotary positions: pairs of features turned by angles computed in registers, q and k in a launch.

A program has a few tokens of a few heads, enough for its sines to cost less than its loads.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from . import relaunch
from .launch import Facts, on_device

HEADS = 4  # that share the angles of a program; nothing was timed on a device yet
TILE = 1024  # angles of a program
MAX_TOKENS = 64


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn,
    batch, first_head, num_heads, offs_n, inside, cos, sin,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """y <- x turned, for tokens offs_n [BLOCK_N] of heads [first_head, first_head + HEADS)."""
    offs_p = tl.arange(0, BLOCK_P)
    if INTERLEAVED:
        first, second = 2 * offs_p, 2 * offs_p + 1
    else:
        first, second = offs_p, offs_p + PAIRS
    mask = inside[:, None] & (offs_p < PAIRS)[None, :]
    x = x_ptr + batch.to(tl.int64) * stride_xb + first_head.to(tl.int64) * stride_xh
    y = y_ptr + batch.to(tl.int64) * stride_yb + first_head.to(tl.int64) * stride_yh
    x += offs_n.to(tl.int64)[:, None] * stride_xn
    y += offs_n.to(tl.int64)[:, None] * stride_yn
    for _ in range(first_head, tl.minimum(first_head + HEADS, num_heads)):
        a = tl.load(x + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + second[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + first[None, :], (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y + second[None, :], (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
        if REST > 0:
            offs_r = tl.arange(0, BLOCK_REST)
            rest = inside[:, None] & (offs_r < REST)[None, :]
            passed = tl.load(x + (2 * PAIRS + offs_r)[None, :], mask=rest)
            tl.store(y + (2 * PAIRS + offs_r)[None, :], passed, mask=rest)
        x += stride_xh
        y += stride_yh


# Sizes of a batch: another one is no reason to compile anew.
@triton.jit(do_not_specialize=["stride_pb", "tokens", "num_blocks"])
def rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, positions_ptr, frequencies_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_qob, stride_qoh, stride_qon, stride_kob, stride_koh, stride_kon,
    stride_pb, tokens, q_heads, k_heads, num_blocks,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % num_blocks
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(k_heads, HEADS)
    group = pid // num_blocks % groups
    batch = pid // num_blocks // groups

    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    inside = offs_n < tokens
    at = positions_ptr + batch.to(tl.int64) * stride_pb + offs_n
    position = tl.load(at, mask=inside, other=0.0)
    frequency = tl.load(frequencies_ptr + offs_p, mask=offs_p < PAIRS, other=0.0)
    # libdevice's, which reduce large angles; the approximations of the hardware do not
    angle = position[:, None] * frequency[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if INVERSE:
        sin = -sin
    if group < q_groups:
        _turn_heads(
            q_ptr, q_out_ptr, stride_qb, stride_qh, stride_qn, stride_qob, stride_qoh, stride_qon,
            batch, group * HEADS, q_heads, offs_n, inside, cos, sin,
            PAIRS, REST, INTERLEAVED, HEADS, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
    else:
        _turn_heads(
            k_ptr, k_out_ptr, stride_kb, stride_kh, stride_kn, stride_kob, stride_koh, stride_kon,
            batch, (group - q_groups) * HEADS, k_heads, offs_n, inside, cos, sin,
            PAIRS, REST, INTERLEAVED, HEADS, BLOCK_P, BLOCK_REST,
        )  # fmt: skip


# In the order of `rotary`, which makes the last two.
POINTERS = ("q_ptr", "k_ptr", "positions_ptr", "frequencies_ptr", "q_out_ptr", "k_out_ptr")


class Turn:
    """All that calls of the same shapes, strides and types have in common."""

    def __init__(
        self, facts: tuple[Facts, ...], pairs: int, interleaved: bool, inverse: bool
    ) -> None:
        q, k, positions, _, q_out, k_out = facts
        packed, head_dim = len(q.shape) == 3, q.shape[-1]
        batch, tokens = (1, q.shape[0]) if packed else (q.shape[0], q.shape[2])
        q_heads, k_heads = q.shape[1], k.shape[1]
        block_p = triton.next_power_of_2(pairs)
        block_n = min(MAX_TOKENS, max(1, TILE // block_p))
        num_blocks = triton.cdiv(tokens, block_n)
        self.programs = (
            num_blocks * batch * (triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS))
        )
        self.arguments: dict[str, Any] = dict(
            stride_pb=tokens if len(positions.shape) == 2 else 0,
            tokens=tokens,
            q_heads=q_heads,
            k_heads=k_heads,
            num_blocks=num_blocks,
            PAIRS=pairs,
            REST=head_dim - 2 * pairs,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            HEADS=HEADS,
            BLOCK_N=block_n,
            BLOCK_P=block_p,
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
            num_warps=4,
            enable_fp_fusion=False,  # the bits of plain torch: each product is rounded
        )
        for name, x in (("q", q), ("k", k), ("qo", q_out), ("ko", k_out)):
            b, h, n = (0, x.strides[1], x.strides[0]) if packed else x.strides[:3]
            self.arguments |= {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}n": n}
        self.plans: relaunch.Plans = {}


@lru_cache(maxsize=256)
def turn(facts: tuple[tuple[Any, ...], ...], *rest: Any) -> Turn:
    return Turn(tuple(Facts(*x) for x in facts), *rest)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op clinattn::rotary, with last strides of 1, contiguous fp32 positions (..., N)."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    tensors = (q, k, positions, frequencies, q_out, k_out)
    facts = tuple([(x.shape, x.stride(), x.dtype, x.device) for x in tensors])
    same = turn(facts, frequencies.shape[0], interleaved, inverse)
    if same.programs > 0:
        with on_device(q.device):
            if not any(plan.again(tensors, {}) for plan in same.plans.get((), ())):
                known: dict[str, Any] = dict(zip(POINTERS, tensors, strict=True))
                plan = relaunch.launch(rotary_kernel, same.programs, known, {}, same.arguments)
                relaunch.keep(same.plans, (), plan)
    return q_out, k_out
