"""The public functions of flash_attn.flash_attn_interface, but for the one with a cache.

Throughout: q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_k, head_dim), any
strides, heads a multiple of heads_k; fp32, bf16, fp16, on the CPU fp64. Results have the dtype of
q, under autocast too.
dropout_p: probability to drop a pair. softmax_scale: default head_dim ** -0.5.
causal: query i of a sequence stands at the key i + seqlen_k - seqlen_q (bottom-right aligned), and
sees no later one.
window_size: (left, right), -1 for no bound, aligned like causal.
alibi_slopes: (heads,) or (batch, heads), aligned like causal.
softcap: scores are softcap tanh(s / softcap), 0.0 for none.
deterministic: gradients are, whatever it says.
return_attn_probs: also softmax_lse, fp32 (batch, heads, seqlen_q) or packed (heads, total_q), the
natural logarithm, and S_dmask, which says which pairs dropout took, by O(N^2) memory: see
dropped.s_dmask. It is empty without dropout.

Unlike flash-attn's: alibi_slopes and softmax_lse have gradients; a query that sees no key has
softmax_lse = -inf (there +inf) beside its output of 0, which merges of partial results weigh with
exp(-inf) = 0. Arguments that make no sense raise TypeError or ValueError before anything is done.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.integrations.flash_attn.calls import dense_call, packed_call
from clinattn.integrations.flash_attn.dropped import s_dmask
from clinattn.integrations.flash_attn.paged import packed_pages
from clinattn.integrations.flash_attn.words import DENSE, PACKED, unpacked
from clinattn.operator.functions import attend
from clinattn.operator.words.scalars import as_flag

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """out (batch, seqlen_q, heads, head_dim), contiguous; see the module for the arguments."""
    return_attn_probs = as_flag("return_attn_probs", return_attn_probs)
    call = dense_call(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    o, lse = attend(call, "")
    return _results(call, o.transpose(1, 2).contiguous(), lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func of kv (batch, seqlen_k, 2, heads_k, head_dim)."""
    k, v = unpacked("kv", kv, 2, DENSE)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func of qkv (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = unpacked("qkv", qkv, 3, DENSE)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """out (total_q, heads, head_dim) of sequences packed one after the other.

    q: (total_q, heads, head_dim); k, v: (total_k, heads_k, head_dim). cu_seqlens_q, cu_seqlens_k:
    int32 (batch + 1,), where sequences start and the last ends. max_seqlen_q, max_seqlen_k: bounds
    of their lengths. Sequences may be empty.
    block_table: (batch, most blocks of a sequence) int32; k and v are then pages, (blocks,
    block_size, heads_k, head_dim), whose tokens are gathered first.
    """
    if block_table is not None:
        k, v = packed_pages(k, v, block_table, cu_seqlens_k)
    return_attn_probs = as_flag("return_attn_probs", return_attn_probs)
    call = packed_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes,
    )  # fmt: skip
    o, lse = attend(call, "")
    return _results(call, o, lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func of kv (total_k, 2, heads_k, head_dim)."""
    k, v = unpacked("kv", kv, 2, PACKED)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func of qkv (total, 3, heads, head_dim)."""
    q, k, v = unpacked("qkv", qkv, 3, PACKED)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _results(call: Arguments, out: Tensor, lse: Tensor, return_attn_probs: bool) -> Any:
    if not return_attn_probs:
        return out
    return out, lse, s_dmask(call, lse) if call.dropout_p > 0 else out.new_zeros(0)
