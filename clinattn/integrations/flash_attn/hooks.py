"""The forward and backward passes on their own, as ring attention calls them.

Backward passes take the out and softmax_lse of the whole ring, write into dq, dk and dv, and return
the row sums of dout out, unpadded, in the dtype of softmax_lse. A query that sees no key of a step
has out = 0 and softmax_lse = -inf there, which merges into any finite one; two of -inf are for the
ring to keep apart. rng_state is the seed of dropout; S_dmask is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import Arguments, Incoming
from clinattn.integrations.flash_attn.paged import packed_pages
from clinattn.integrations.flash_attn.words import (
    DENSE,
    PACKED,
    band,
    check_qkv,
    check_softcap,
)
from clinattn.operator.functions import BACKWARD, FORWARD
from clinattn.operator.visibility import fold_window
from clinattn.operator.words import checks, feature_checks
from clinattn.operator.words.features import SEEDS

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
    call = _dense_call(
        q, k, v, dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap,
        alibi_slopes, rng_state=None,
    )  # fmt: skip
    o, lse = _forward(call)
    return o.transpose(1, 2).contiguous(), lse, o.new_zeros(0), _rng_state(call)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of packed q, k, v; no gradient.

    Raises NotImplementedError for leftpad_k and seqused_k.
    """
    for name, x in (("leftpad_k", leftpad_k), ("seqused_k", seqused_k)):
        if x is not None:
            raise NotImplementedError(f"{name}: got a tensor, expected None; pack k and v instead")
    if block_table is not None:
        k, v = packed_pages(k, v, block_table, cu_seqlens_k)
    call = _packed_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, (window_size_left, window_size_right), softcap, alibi_slopes, rng_state=None,
    )  # fmt: skip
    o, lse = _forward(call)
    return o, lse, o.new_zeros(0), _rng_state(call)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
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
    call = _dense_call(
        q, k, v, dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap,
        alibi_slopes, _seed_for_backward(q, dropout_p, rng_state),
    )  # fmt: skip
    _check_results(q, dout, out, softmax_lse, (*q.shape[:1], q.shape[2], q.shape[1]))
    _check_written(q, k, v, dq, dk, dv)
    *grads, delta = _backward(call, dout.transpose(1, 2), out.transpose(1, 2), softmax_lse)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad.transpose(1, 2))
    return delta


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
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
    call = _packed_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        _seed_for_backward(q, dropout_p, rng_state),
    )  # fmt: skip
    _check_results(q, dout, out, softmax_lse, (q.shape[1], q.shape[0]))
    _check_written(q, k, v, dq, dk, dv)
    *grads, delta = _backward(call, dout, out, softmax_lse)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad)
    return delta.transpose(0, 1).contiguous()


# Ring code reads the signatures above with getfullargspec, which no decorator survives.
@torch.no_grad()
def _forward(call: Arguments) -> tuple[Tensor, Tensor]:
    o, lse, _ = FORWARD(*call, "")
    return o, lse


@torch.no_grad()
def _backward(call: Arguments, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """(dq, dk, dv, rowsum(do o)) in the layout of call."""
    o, lse = o.contiguous(), lse.contiguous()
    incoming = Incoming(do, None, o, lse, None)
    dq, dk, dv, *_ = BACKWARD(*incoming, *call, NO_GRADIENTS_BUT_QKV, "")
    return dq, dk, dv, (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)


def _dense_call(q: Any, k: Any, v: Any, *words: Any, **more: Any) -> Arguments:
    check_qkv(q, k, v, DENSE)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    checks.check_dense(q, k, v, enable_gqa=True)
    return Arguments(
        q, k, v,
        max_seqlen_q=q.shape[2],
        max_seqlen_k=k.shape[2],
        **_shared(q, q.shape[0], *words, **more),
    )  # fmt: skip


def _packed_call(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *words: Any,
    **more: Any,
) -> Arguments:
    check_qkv(q, k, v, PACKED)
    checks.check_packed(q, k, v, enable_gqa=True)
    longest_q = checks.check_cu_seqlens(
        "q", cu_seqlens_q, max_seqlen_q, q.shape[0], q.device
    )
    longest_k = checks.check_cu_seqlens(
        "k", cu_seqlens_k, max_seqlen_k, k.shape[0], k.device
    )
    batch = len(cu_seqlens_q) - 1
    if len(cu_seqlens_k) - 1 != batch:
        raise ValueError(
            f"cu_seqlens_k: got {len(cu_seqlens_k) - 1} sequences, expected the {batch} of "
            "cu_seqlens_q"
        )
    return Arguments(
        q, k, v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        **_shared(q, batch, *words, **more),
    )  # fmt: skip


def _shared(
    q: Tensor,
    batch: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
) -> dict[str, Any]:
    left, right = fold_window(checks.check_window(band(causal, window_size)), False)
    dropout_p = feature_checks.check_dropout(dropout_p)
    heads, slopes, seed = q.shape[1], None, None
    if alibi_slopes is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        slopes = feature_checks.check_per_head(
            "alibi_slopes", alibi_slopes, q, (heads,), (batch, heads), dtype=dtype
        ).view(-1, heads)
    if dropout_p > 0:
        seed = torch.randint(0, SEEDS, (1,), device=q.device) if rng_state is None else rng_state
    return {
        "slopes": slopes,
        "seed": seed,
        "scale": checks.check_scale(softmax_scale, q.shape[-1], q.dtype),
        "window_left": left,
        "window_right": right,
        "bottom_right": True,
        "softcap": feature_checks.check_softcap(check_softcap(softcap), q.dtype),
        "dropout_p": dropout_p,
    }


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
        checks.check_on(name, x, q.device, "q")
        if x.shape != like.shape or not x.is_floating_point():
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)}, expected a floating tensor "
                f"{tuple(like.shape)} to fill"
            )
