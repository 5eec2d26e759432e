"""Rotary positions: pairs of features turned by angles computed in registers, q and k in a launch.

A program has a few tokens of a few heads, enough for its sines to cost less than its loads.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import relaunch
from .launch import Facts, on_device, row_strides
from .parameters import Strides

HEADS = 4  # heads that share the angles of a program; not timed on a device yet
TILE = 1024  # angles of a program
MAX_TOKENS = 64


class TurnInputs(NamedTuple):
    """The tensors of a turn, of which q_out and k_out are written."""

    q: Any
    k: Any
    positions: Any
    frequencies: Any
    q_out: Any
    k_out: Any


class TurnStrides(NamedTuple):
    """Strides of the tensors with features."""

    q: Strides
    k: Strides
    q_out: Strides
    k_out: Strides


class TurnForm(NamedTuple):
    """The constexprs of rotary_kernel: 2 PAIRS features are turned, REST are copied; HEADS share a
    program.
    """

    PAIRS: int
    REST: int
    INTERLEAVED: bool
    INVERSE: bool
    HEADS: int
    BLOCK_N: int
    BLOCK_P: int
    BLOCK_REST: int


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, x_strides, y_strides, batch, first_head, num_heads, offs_n, inside, cos, sin,
    form: tl.constexpr,
):  # fmt: skip
    """Writes y <- x turned, for tokens offs_n of heads [first_head, first_head + HEADS)."""
    offs_p = tl.arange(0, form.BLOCK_P)
    if form.INTERLEAVED:
        first, second = 2 * offs_p, 2 * offs_p + 1
    else:
        first, second = offs_p, offs_p + form.PAIRS
    mask = inside[:, None] & (offs_p < form.PAIRS)[None, :]
    x = x_ptr + batch.to(tl.int64) * x_strides.b + first_head.to(tl.int64) * x_strides.h
    y = y_ptr + batch.to(tl.int64) * y_strides.b + first_head.to(tl.int64) * y_strides.h
    x += offs_n.to(tl.int64)[:, None] * x_strides.n
    y += offs_n.to(tl.int64)[:, None] * y_strides.n
    for _ in range(first_head, tl.minimum(first_head + form.HEADS, num_heads)):
        a = tl.load(x + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + second[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + first[None, :], (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y + second[None, :], (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
        if form.REST > 0:
            offs_r = tl.arange(0, form.BLOCK_REST)
            rest = inside[:, None] & (offs_r < form.REST)[None, :]
            passed = tl.load(x + (2 * form.PAIRS + offs_r)[None, :], mask=rest)
            tl.store(y + (2 * form.PAIRS + offs_r)[None, :], passed, mask=rest)
        x += x_strides.h
        y += y_strides.h


# These follow from the sizes of a batch, for which a kernel is not compiled anew.
@triton.jit(do_not_specialize=["stride_pb", "tokens", "num_blocks"])
def rotary_kernel(
    inputs, strides, stride_pb, tokens, q_heads, k_heads, num_blocks, form: tl.constexpr
):
    """Writes q_out and k_out: HEADS heads of BLOCK_N tokens."""
    pid = tl.program_id(0)
    block = pid % num_blocks
    q_groups = tl.cdiv(q_heads, form.HEADS)
    groups = q_groups + tl.cdiv(k_heads, form.HEADS)
    group = pid // num_blocks % groups
    batch = pid // num_blocks // groups

    offs_n = block * form.BLOCK_N + tl.arange(0, form.BLOCK_N)
    offs_p = tl.arange(0, form.BLOCK_P)
    inside = offs_n < tokens
    at = inputs.positions + batch.to(tl.int64) * stride_pb + offs_n
    position = tl.load(at, mask=inside, other=0.0)
    frequency = tl.load(inputs.frequencies + offs_p, mask=offs_p < form.PAIRS, other=0.0)
    # sine and cosine of libdevice, which reduce large angles; those of the hardware do not
    angle = position[:, None] * frequency[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if form.INVERSE:
        sin = -sin
    if group < q_groups:
        _turn_heads(
            inputs.q, inputs.q_out, strides.q, strides.q_out,
            batch, group * form.HEADS, q_heads, offs_n, inside, cos, sin, form,
        )  # fmt: skip
    else:
        _turn_heads(
            inputs.k, inputs.k_out, strides.k, strides.k_out,
            batch, (group - q_groups) * form.HEADS, k_heads, offs_n, inside, cos, sin, form,
        )  # fmt: skip


class Turn:
    """The part of a launch that calls of the same shapes, strides and types share."""

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
            strides=TurnStrides(*(Strides(*row_strides(x, packed)) for x in (q, k, q_out, k_out))),
            stride_pb=tokens if len(positions.shape) == 2 else 0,
            tokens=tokens,
            q_heads=q_heads,
            k_heads=k_heads,
            num_blocks=num_blocks,
            form=TurnForm(
                PAIRS=pairs,
                REST=head_dim - 2 * pairs,
                INTERLEAVED=interleaved,
                INVERSE=inverse,
                HEADS=HEADS,
                BLOCK_N=block_n,
                BLOCK_P=block_p,
                BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
            ),
            num_warps=4,
            enable_fp_fusion=False,  # the bits of plain torch: each product is rounded
        )
        self.plans: relaunch.Plans = {}


@lru_cache(maxsize=256)
def turn(device: torch.device, facts: tuple[tuple[Any, ...], ...], *rest: Any) -> Turn:
    """Returns the Turn of tensors on `device` with these fields of Facts."""
    return Turn(tuple(Facts(*x) for x in facts), *rest)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q and k turned, as the op clinattn::rotary does.

    The last stride of q and k is 1; positions: fp32 (..., N), contiguous.
    """
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    inputs = TurnInputs(q, k, positions, frequencies, q_out, k_out)
    facts = tuple([(x.shape, x.stride(), x.dtype) for x in inputs])
    same = turn(q.device, facts, frequencies.shape[0], interleaved, inverse)
    if same.programs > 0:
        with on_device(q.device):
            if not any(plan.again(inputs, {}) for plan in same.plans.get((), ())):
                plan = relaunch.launch(rotary_kernel, same.programs, inputs, {}, same.arguments)
                relaunch.keep(same.plans, (), plan)
    return q_out, k_out
