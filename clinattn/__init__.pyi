"""Types of the public names; tests/lib/stubs.py writes this file."""

from typing import Literal, overload

from torch import Tensor

from clinattn.backends.select import backends as backends
from clinattn.explain.attribute import attribute as attribute
from clinattn.explain.explanation import explain as explain
from clinattn.integrations.replace import replace_attention as replace_attention
from clinattn.operator import ranges as ranges
from clinattn.operator.functions import FusedAttention as FusedAttention
from clinattn.operator.relative import t5_relative_bias as t5_relative_bias
from clinattn.operator.rotary import rotary as rotary
from clinattn.operator.summary import attention_summary as attention_summary
from clinattn.operator.visibility import PreparedMask, Window
from clinattn.parallel.context import context_parallel as context_parallel

__version__: str

@overload
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: Window = ...,
    bottom_right: bool = ...,
    kv_lengths: Tensor | None = ...,
    q_lengths: Tensor | None = ...,
    segment_ids: Tensor | None = ...,
    times: Tensor | None = ...,
    time_window: float | None = ...,
    time_decay: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    global_prefix: int = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: Window = ...,
    bottom_right: bool = ...,
    kv_lengths: Tensor | None = ...,
    q_lengths: Tensor | None = ...,
    segment_ids: Tensor | None = ...,
    times: Tensor | None = ...,
    time_window: float | None = ...,
    time_decay: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    global_prefix: int = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: Window = ...,
    bottom_right: bool = ...,
    kv_lengths: Tensor | None = ...,
    q_lengths: Tensor | None = ...,
    segment_ids: Tensor | None = ...,
    times: Tensor | None = ...,
    time_window: float | None = ...,
    time_decay: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    global_prefix: int = ...,
    return_lse: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def fused_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: Window = ...,
    bottom_right: bool = ...,
    times: Tensor | None = ...,
    time_window: float | None = ...,
    time_decay: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    global_prefix: int = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def fused_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: Window = ...,
    bottom_right: bool = ...,
    times: Tensor | None = ...,
    time_window: float | None = ...,
    time_decay: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    global_prefix: int = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: Window = ...,
    bottom_right: bool = ...,
    times: Tensor | None = ...,
    time_window: float | None = ...,
    time_decay: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    global_prefix: int = ...,
    return_lse: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
