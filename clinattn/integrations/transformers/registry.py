"""clinattn as an attention implementation of Hugging Face transformers.

    clinattn.integrations.transformers.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="clinattn")

Function and mask are registered together: with the function alone transformers passes no mask at
all, and padding is attended to without a word.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from clinattn.integrations.transformers.documents import documents, warn_of_one_document
from clinattn.integrations.transformers.masks import attention_mask, parts_of
from clinattn.integrations.transformers.pattern_mask import Pattern
from clinattn.integrations.transformers.split_rows import check_part
from clinattn.operator import split
from clinattn.operator.attention import fused_attention, fused_attention_varlen
from clinattn.operator.visibility import PreparedMask, combined, concrete, right_padded_lengths

NAME = "clinattn"

# Words that say how something is computed or what else is wanted, not what attention is.
HARMLESS = frozenset(
    {
        "deterministic", "output_attentions", "output_hidden_states", "position_ids", "use_cache",
        "encoder_hidden_states", "cache_position", "position_embeddings", "return_dict",
        "num_items_in_batch", "target_dtype", "layer_idx", "attn_implementation", "training",
        "is_cross_attention", "past_key_values", "num_logits_to_keep", "logits_to_keep",
        "output_router_logits",
    }
)  # fmt: skip
# Words that are part of the mathematics, and are not served.
REFUSED = {
    "cache": "paged caches of continuous batching",
    "block_table": "paged caches",
    "indices": "sparse attention over chosen keys",
    "block_indices": "sparse attention over chosen blocks",
    "head_mask": "head masks",
    "sinks": "sinks under this name",
    "layer_head_mask": "head masks",
}


def register() -> None:
    """Makes attn_implementation="clinattn" known to transformers, for all models of the process.

    Call it before a model is loaded with that name. Twice does no harm.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that is registered; see transformers' AttentionInterface.

    query: (B, H, Nq, D); key, value: (B, Hkv, Nk, D), value with a head dimension of its own if
    need be. attention_mask: what attention_mask() of transformers_masks made, which says all about
    visibility; a complete one of the caller, bool or floating, (B or 1, H or 1, Nq, Nk); (B, Nk),
    nonzero = a token; or None. For the last two is_causal, else the module's own flag, and
    sliding_window count, from the last query and key on. s_aux: (H,), the logit of a sink.
    position_bias: broadcasts to (B, H, Nq, Nk), added to the scores, with a gradient.
    cu_seq_lens_q, cu_seq_lens_k: one row, (1, H, T, D), of packed documents; so is, for encoders, a
    row without a mask whose position_ids start over, where the model hands them on as BERT does.

    Returns (o (B, Nq, H, D), None): weights are never formed, and a warning says so once where they
    are asked for. Raises NotImplementedError for words that change the mathematics.
    """
    _check_words(module, kwargs)
    if query.dim() != 4:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected (B, H, N, D)")
    if split.active is not None:
        check_part(split.active, query.shape[2], attention_mask, position_ids, cu_seq_lens_q)
    packed = cu_seq_lens_q is not None
    if attention_mask is not None and not packed:
        warn_of_one_document(attention_mask, position_ids, query, key)
    mask, pattern = _visible(
        module, query, key, attention_mask, position_ids, is_causal, sliding_window
    )
    if pattern.right != 0 and pattern.segment_ids is None and mask is None and not packed:
        pattern = pattern._replace(segment_ids=documents(position_ids, query, key))
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    words: dict[str, Any] = {
        "dropout_p": dropout if module.training else 0.0,
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "enable_gqa": key.shape[1] != query.shape[1],
        "softcap": softcap,
        "return_lse": s_aux is not None,
    }
    if packed:
        ends = _Ends.of(query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        if mask is None and position_bias is None:
            results = ends.attend(query, key, value, pattern, words)
        else:
            pattern = pattern._replace(segment_ids=ends.segment_ids())
            results = _dense(query, key, value, mask, position_bias, pattern, words)
    else:
        results = _dense(query, key, value, mask, position_bias, pattern, words)
    if s_aux is None:
        o = results
    else:
        # The sink is one more key, without a value: it takes its share of every weight.
        o, lse = results
        sink = s_aux.to(lse.dtype)[:, None]
        o = o * torch.sigmoid(lse - sink)[..., None].to(o.dtype)
    return o.transpose(1, 2).contiguous(), None


def _check_words(module: nn.Module, words: dict[str, Any]) -> None:
    for name, value in words.items():
        if value is None or name in HARMLESS:
            continue
        if name in REFUSED:
            raise NotImplementedError(
                f"{name}: {REFUSED[name]} are not served by clinattn; give {type(module).__name__} "
                f"attn_implementation='eager'"
            )
        if not torch.compiler.is_compiling():
            _warn(f"{type(module).__name__} passes {name!r}, which clinattn ignores")
    if words.get("output_attentions") and not torch.compiler.is_compiling():
        _warn(
            "output_attentions: clinattn never forms the attention weights, and returns None for "
            "them; clinattn.explain(model) and clinattn.attention_summary say what was attended to "
            "without them, attn_implementation='eager' gives them"
        )


@cache
def _warn(message: str) -> None:
    """Warns once for each message, whatever the layer."""
    warnings.warn(message, stacklevel=4)


def _visible(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    is_causal: bool | None,
    window: int | None,
) -> tuple[Tensor | None, Pattern]:
    """A mask for fused_attention, and the pattern to intersect it with."""
    if mask is None:
        return None, _spoken(module, query, key, is_causal, window)
    batch, n_queries, n_keys = query.shape[0], query.shape[2], key.shape[2]
    mask, pattern = parts_of(mask)
    if mask.dim() == 2:
        mask, pattern = mask.ne(0)[:, None, None], None
    elif mask.dim() != 4:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected (B, Nk) or (B, H, Nq, Nk)"
        )
    if mask.shape[-1] != n_keys:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)} for {batch} rows with {n_queries} "
            f"queries and {n_keys} keys"
        )
    if pattern is not None:
        return mask if pattern.padded else None, pattern
    if mask.dtype == torch.bool and mask.shape[2] == 1 < n_queries:
        _check_says_all(module, mask, query, key, position_ids, is_causal, window)
    return mask, Pattern()


def _check_says_all(
    module: nn.Module,
    mask: Tensor,
    query: Tensor,
    key: Tensor,
    position_ids: Tensor | None,
    is_causal: bool | None,
    window: int | None,
) -> None:
    """Refuses a mask of the keys alone where the call has a pattern that it may have lost."""
    spoken = _spoken(module, query, key, is_causal, window)
    meant = None
    if spoken.left is not None or spoken.right is not None:
        meant = "a causal or windowed layer"
    elif position_ids is not None and concrete(position_ids):
        if documents(position_ids, query, key) is not None:
            meant = "position_ids of packed documents"
    if meant is not None:
        raise ValueError(
            f"attention_mask: got a mask of the keys alone, {tuple(mask.shape)}, with {meant}, as "
            "a copy within a compiled graph leaves it; expected (B, Nk), nonzero = a token, or a "
            f"complete one, (B, 1, {query.shape[2]}, {mask.shape[3]})"
        )


def _spoken(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, window: int | None
) -> Pattern:
    """The pattern that the words of a call describe: queries stand at the last keys."""
    if is_causal is None:
        cross = getattr(module, "is_cross_attention", False)
        is_causal = bool(getattr(module, "is_causal", False)) and not cross
    side = None if window is None else window - 1
    return Pattern(side, 0 if is_causal else side, key.shape[2] - query.shape[2])


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    pattern: Pattern,
    words: dict[str, Any],
) -> Any:
    left, right, offset, segment_ids, _, prepared = pattern
    n_queries, n_keys = query.shape[2], key.shape[2]
    bounded = left is not None or right is not None
    bottom_right = bounded and offset != 0
    attn_mask: Tensor | PreparedMask | None = mask
    kv_lengths = None
    if bottom_right and offset != n_keys - n_queries:
        inside = pattern.band(n_queries, n_keys, query.device)
        attn_mask = mask = inside if mask is None else combined(mask, inside)
        left = right = None
        bottom_right = False
    elif mask is not None and prepared is not None and not bottom_right:
        if mask.device == query.device and len(mask) == len(query):
            attn_mask = None if prepared.hides_nothing() else prepared
    if bias is not None:
        if mask is not None and mask.shape[1:3] == (1, 1) and not bottom_right:
            kv_lengths = right_padded_lengths(mask[:, 0, 0])
        attn_mask = bias if mask is None or kv_lengths is not None else combined(mask, bias)
    return fused_attention(
        query, key, value, attn_mask, window=None if left is right is None else (left, right),
        bottom_right=bottom_right, segment_ids=segment_ids, kv_lengths=kv_lengths, **words,
    )  # fmt: skip


class _Ends(NamedTuple):
    """Ends of the documents of a packed row."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    n_queries: int
    n_keys: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        ends_q: Tensor | None,
        ends_k: Tensor | None,
        longest_q: Any,
        longest_k: Any,
    ) -> _Ends:
        assert ends_q is not None
        if query.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens_q: got {query.shape[0]} rows, expected 1 with all documents in it"
            )
        ends_k = ends_q if ends_k is None else ends_k
        for name, x, n in (("q", ends_q, query.shape[2]), ("k", ends_k, key.shape[2])):
            if split.active is not None:
                n = split.active.part(n).total
            if concrete(x) and int(x[-1]) != n:
                raise ValueError(
                    f"cu_seq_lens_{name}: got documents up to {int(x[-1])} in a row of {n}"
                )
        max_q, max_k = (
            None if x is None or (isinstance(x, Tensor) and not concrete(x)) else int(x)
            for x in (longest_q, longest_k)
        )
        cu_q, cu_k = ends_q.to(torch.int32), ends_k.to(torch.int32)
        return cls(cu_q, cu_k, max_q, max_k, query.shape[2], key.shape[2])

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, words: dict[str, Any]
    ) -> Any:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        results = fused_attention_varlen(
            q, k, v, *self[:4], window=(pattern.left, pattern.right), bottom_right=True, **words
        )
        if not words["return_lse"]:
            return results.transpose(0, 1)[None]
        o, lse = results
        return o.transpose(0, 1)[None], lse[None]

    def segment_ids(self) -> Tensor:
        """Segment ids (1, N), for queries and keys alike."""
        if self.n_queries != self.n_keys:
            raise NotImplementedError(
                "cu_seq_lens: packed cross-attention takes no mask and no position bias"
            )
        positions = torch.arange(self.n_queries, device=self.cu_seqlens_q.device)
        return torch.bucketize(positions, self.cu_seqlens_q[1:].long(), right=True)[None]
