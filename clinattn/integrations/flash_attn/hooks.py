"""The forward and backward passes on their own, as ring attention calls them.

Backward passes take the out and softmax_lse of the whole ring, write into those of dq, dk and dv
that are not None, and return the row sums of dout out, unpadded, in the dtype of softmax_lse. A
query that sees no key of a step has out = 0 and softmax_lse = -inf there, which merges into any
finite one; two of -inf are for the ring to keep apart. rng_state is the seed of dropout. S_dmask is
empty unless return_softmax asks for it, which needs a dropout_p > 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import Arguments, Incoming
from clinattn.integrations.flash_attn.calls import dense_call, packed_call
from clinattn.integrations.flash_attn.dropped import s_dmask
from clinattn.integrations.flash_attn.used import used_keys
from clinattn.integrations.flash_attn.words import check_num_splits
from clinattn.operator.functions import BACKWARD, FORWARD
from clinattn.operator.words import checks, feature_checks
from clinattn.operator.words.scalars import as_flag

NO_GRADIENTS_BUT_QKV = 0


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of dense q, k, v; no gradient."""
    call = dense_call(
        q, k, v, dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap,
        alibi_slopes,
    )  # fmt: skip
    o, lse, dropped = _forward(call, return_softmax)
    return o.transpose(1, 2).contiguous(), lse, dropped, _rng_state(call)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of packed q, k, v; no gradient.

    Of each sequence the keys [leftpad_k, seqused_k) are used, (batch,) int32 both, by default all;
    S_dmask counts them from the first one used.
    """
    check_num_splits(num_splits)
    k, v, cu_seqlens_k = used_keys(
        k, v, cu_seqlens_k, cu_seqlens_q, block_table, seqused_k, leftpad_k
    )
    call = packed_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, (window_size_left, window_size_right), softcap, alibi_slopes,
    )  # fmt: skip
    return *_forward(call, return_softmax), _rng_state(call)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk, dv of dense q, k, v; returns (batch, heads, seqlen_q) row sums."""
    call = dense_call(
        q, k, v, dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap,
        alibi_slopes, _seed_for_backward(q, dropout_p, rng_state),
    )  # fmt: skip
    _check_results(q, dout, out, softmax_lse, (*q.shape[:1], q.shape[2], q.shape[1]))
    _check_written(q, k, v, dq, dk, dv)
    *grads, delta = _backward(call, dout.transpose(1, 2), out.transpose(1, 2), softmax_lse)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        if given is not None:
            given.copy_(grad.transpose(1, 2))
    return delta


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk, dv of packed q, k, v; returns (heads, total_q) row sums."""
    call = packed_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        _seed_for_backward(q, dropout_p, rng_state),
    )  # fmt: skip
    _check_results(q, dout, out, softmax_lse, (q.shape[1], q.shape[0]))
    _check_written(q, k, v, dq, dk, dv)
    *grads, delta = _backward(call, dout, out, softmax_lse)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        if given is not None:
            given.copy_(grad)
    return delta.transpose(0, 1).contiguous()


# Ring code reads the signatures above with getfullargspec, which no decorator survives.
@torch.no_grad()
def _forward(call: Arguments, return_softmax: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse, S_dmask), the latter empty unless asked for."""
    return_softmax = as_flag("return_softmax", return_softmax)
    if return_softmax and call.dropout_p == 0:
        raise ValueError("return_softmax: got True without dropout, expected a dropout_p > 0")
    o, lse, _ = FORWARD(*call, "")
    return o, lse, s_dmask(call, lse) if return_softmax else o.new_zeros(0)


@torch.no_grad()
def _backward(call: Arguments, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """(dq, dk, dv, rowsum(do o)) in the layout of call."""
    o, lse = o.contiguous(), lse.contiguous()
    incoming = Incoming(do, None, o, lse, None)
    dq, dk, dv, *_ = BACKWARD(*incoming, *call, NO_GRADIENTS_BUT_QKV, "")
    return dq, dk, dv, (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)


def _rng_state(call: Arguments) -> Tensor:
    return (
        torch.zeros(1, dtype=torch.int64, device=call.q.device) if call.seed is None else call.seed
    )


def _seed_for_backward(q: Any, dropout_p: Any, rng_state: Any) -> Tensor | None:
    checks.check_tensor("q", q)
    if feature_checks.check_dropout(dropout_p) == 0:
        return None
    if rng_state is None:
        raise ValueError(
            f"rng_state: got None with dropout_p={dropout_p}, expected that of the forward pass"
        )
    checks.check_tensor("rng_state", rng_state)
    if rng_state.dtype != torch.int64 or rng_state.shape != (1,) or rng_state.device != q.device:
        raise ValueError(
            f"rng_state: got {rng_state.dtype} {tuple(rng_state.shape)} on {rng_state.device}, "
            f"expected that of the forward pass, torch.int64 (1,) on {q.device}"
        )
    return rng_state


def _check_results(q: Tensor, dout: Any, out: Any, lse: Any, lse_shape: tuple[int, ...]) -> None:
    for name, x in (("dout", dout), ("out", out), ("softmax_lse", lse)):
        checks.check_on(name, x, q.device, "q")
    for name, x in (("dout", dout), ("out", out)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name}: got {tuple(x.shape)}, expected the shape of q, {tuple(q.shape)}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got {x.dtype}, expected that of q, {q.dtype}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != dtype or tuple(lse.shape) != lse_shape:
        given = f"{lse.dtype} {tuple(lse.shape)}"
        raise ValueError(f"softmax_lse: got {given}, expected {dtype} {lse_shape}")


def _check_written(q: Tensor, k: Tensor, v: Tensor, dq: Any, dk: Any, dv: Any) -> None:
    for name, x, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        if x is None:
            continue
        checks.check_on(name, x, q.device, "q")
        if x.shape != like.shape or not x.is_floating_point():
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)}, expected a floating tensor "
                f"{tuple(like.shape)} to fill"
            )
