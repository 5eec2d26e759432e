"""memory_efficient_attention, with gradients, and its two passes on their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import Incoming
from clinattn.integrations.xformers.layouts import layout_of
from clinattn.integrations.xformers.problem import problem_of
from clinattn.operator.functions import BACKWARD
from clinattn.operator.words.checks import SERVED_DTYPES, check_on
from clinattn.operator.words.scalars import as_float

NO_GRADIENTS_BUT_QKV = 0


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Exact softmax attention in O(N) memory, with xformers' arguments.

    query: (B, Mq, H, K); key: (B, Mk, H, K); value: (B, Mk, H, Kv). Or without the heads, or
    grouped, (B, M, G, H, K), where key and value may have been expanded from H = 1: groups of
    query heads then share them. fp32, bf16, fp16, on the CPU fp64. K and Kv may differ; where one
    is above 256, the reference serves, with a warning.
    attn_bias: a tensor added to the scores, of as many dimensions as query, (B, [G, H,] Mq, Mk) or
    1 in place of any size; or one of the biases of this package or xformers. Tensors may need a
    gradient.
    p: probability to drop a pair. scale: default K ** -0.5. op: xformers' choice of kernels; here
    the device and dtype choose, and it is not read. output_dtype: of the result, which is rounded
    to the dtype of query before; default that of query.

    Returns (B, Mq, H, Kv), in the layout of query. A query that sees no key returns 0.
    Raises NotImplementedError for other biases, ValueError and TypeError for wrong arguments.
    """
    return attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


@torch.no_grad()
def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """memory_efficient_attention without gradients."""
    return attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


@torch.no_grad()
def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) for memory_efficient_attention_backward: neither has a gradient here.

    p: 0. lse: natural logarithm, fp32, (B, H, Mq), grouped (B, G, H, Mq); with block-diagonal
    biases (1, H, Mq). -inf for a query that sees no key.
    """
    refuse_dropout(p)
    return attend(query, key, value, attn_bias, p, scale, output_dtype)


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of query, key and value, whose gradient of the output is grad.

    output, lse: of memory_efficient_attention_forward_requires_grad, or of all keys where key and
    value are a part of them: dq of the parts then add up. grad and output are rounded to the dtype
    of query. p: 0. attn_bias, scale: those of the forward pass; a tensor gets no gradient here.
    """
    refuse_dropout(p)
    layout_of(query, key, value)
    with torch.enable_grad():
        leaves = [_leaf(x) for x in (query, key, value)]
        problem = problem_of(leaves[0], leaves[1], leaves[2], attn_bias, scale)
    call = problem.arguments()
    shape = (*query.shape[:-1], value.shape[-1])
    for name, x in (("grad", grad), ("output", output)):
        check_on(name, x, query.device)
        if x.shape != shape or not x.is_floating_point():
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)}, expected floats {tuple(shape)}"
            )
    with torch.no_grad():
        do, o = (problem.cotangent(x.to(query.dtype)) for x in (grad, output))
        lse = problem.checked_lse(lse)
        incoming = Incoming(do, None, o.contiguous(), lse.contiguous(), None)
        dq, dk, dv, *_ = BACKWARD(*incoming, *call, NO_GRADIENTS_BUT_QKV, "")
    # Through the layout: from the keys that count to all of them.
    found = torch.autograd.grad((problem.q, problem.k, problem.v), leaves, (dq, dk, dv))
    return found[0], found[1], found[2]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any,
    p: float,
    scale: float | None,
    output_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the layout of query."""
    problem = problem_of(query, key, value, attn_bias, scale)
    p = as_float("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}, expected a probability from 0 to 1")
    check_output_dtype(output_dtype)
    out, lse = problem.solved(p)
    return (out if output_dtype is None else out.to(output_dtype)), lse


def refuse_dropout(p: Any) -> None:
    if as_float("p", p) != 0:
        raise NotImplementedError(
            f"p: got {p}, expected 0.0: dropout is not the same in two calls; call "
            "memory_efficient_attention"
        )


def check_output_dtype(dtype: Any) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise TypeError(f"output_dtype: got {dtype}, expected fp32, fp64, bf16 or fp16")


def _leaf(x: Tensor) -> Tensor:
    """x as a leaf, copied where its heads were expanded from one: each has its own gradient."""
    if x.dtype not in SERVED_DTYPES:
        raise TypeError(f"query, key, value: got {x.dtype}, expected one of {SERVED_DTYPES}")
    is_shared = x.dim() == 5 and x.stride(3) == 0
    return (x.contiguous() if is_shared else x).detach().requires_grad_()
