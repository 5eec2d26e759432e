"""ModernBERT and T5 as transformers 5.0 has them: attention in code of their own.

Later releases ask the registry of attention functions in these two, and models.py serves
them there. Keys that are padding may hold any value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from clinattn.integrations.outcome import Outcome
from clinattn.integrations.swap import subclasses, swap, swap_back, warn_of_attentions
from clinattn.integrations.unsupported import asks_registry
from clinattn.operator.attention import fused_attention

DETAIL = "fused_attention"


class _ModernBert(nn.Module):
    """Self-attention over all tokens or a window, with rotated queries and keys."""

    forward_parameters = (
        "hidden_states", "position_embeddings", "output_attentions", "kwargs"
    )  # fmt: skip

    Wqkv: nn.Linear
    Wo: nn.Linear
    out_drop: nn.Module
    num_heads: int
    head_dim: int
    local_attention: tuple[int, int]
    attention_dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool | None = False,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """Returns (o,), o (B, N, E).

        position_embeddings: cosines and sines, (B, N, D) each; only layers built for flash-attn,
        which adapt keeps, get None. attention_mask: (B, 1, N, N), added to the scores; it hides
        padding alone.
        """
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(
                hidden_states, position_embeddings, output_attentions,
                attention_mask=attention_mask, **kwargs,
            )  # fmt: skip
        qkv = self.Wqkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        assert position_embeddings is not None
        q, k = (_rotated(x, *position_embeddings) for x in (q, k))
        # made of a mask of the keys: its rows are alike
        seen = None if attention_mask is None else attention_mask[:, :, :1] == 0
        dropout_p = self.attention_dropout if self.training else 0.0
        window = None if self.local_attention == (-1, -1) else self.local_attention
        o = fused_attention(q, k, v, seen, dropout_p, window=window)
        return (self.out_drop(self.Wo(o.transpose(1, 2).flatten(2))),)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, N, D), whose halves are rotated against each other; cos, sin: (B, N, D)."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


class _T5(nn.Module):
    """Self- or cross-attention with a bias that a stack's first layer makes for all."""

    forward_parameters = (
        "hidden_states", "mask", "key_value_states", "position_bias", "past_key_values",
        "query_length", "use_cache", "output_attentions",
    )  # fmt: skip

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    n_heads: int
    layer_idx: int
    dropout: float
    has_relative_attention_bias: bool
    compute_bias: Any

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        query_length: int | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Returns (o, position_bias): (B, N, E), and what was added to the scores.

        The stack hands position_bias to the layers that follow, which then add it as it is.
        """
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(
                hidden_states, mask, key_value_states, position_bias, past_key_values,
                query_length, use_cache, output_attentions, cache_position,
            )  # fmt: skip
        q = self._heads(self.q(hidden_states))
        k, v = self._keys_and_values(
            hidden_states, key_value_states, past_key_values, cache_position
        )
        if position_bias is None:
            position_bias = self._added(q.shape[2], k.shape[2], mask, cache_position)
        dropout_p = self.dropout if self.training else 0.0
        o = fused_attention(q, k, v, position_bias, dropout_p, scale=1.0)
        return self.o(o.transpose(1, 2).flatten(2)), position_bias

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def _keys_and_values(
        self, hidden: Tensor, of_encoder: Tensor | None, cache: Any, places: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, H, K, D) each, with those that the cache holds already.

        of_encoder: the states of cross-attention, whose keys and values enter the cache in the
        first step of decoding and are taken from it later. places: positions of the queries.
        """
        both, layer = isinstance(cache, EncoderDecoderCache), self.layer_idx
        crossing = of_encoder is not None
        if both:
            of_layer = cache.cross_attention_cache if crossing else cache.self_attention_cache
            if crossing and cache.is_updated.get(layer):
                return of_layer.layers[layer].keys, of_layer.layers[layer].values
        else:
            of_layer = cache
        states = of_encoder if of_encoder is not None else hidden
        k, v = self._heads(self.k(states)), self._heads(self.v(states))
        if of_layer is not None:
            where = {"cache_position": None if crossing else places}
            k, v = of_layer.update(k, v, layer, where)
            if both and crossing:
                cache.is_updated[layer] = True
        return k, v

    def _added(
        self, n_queries: int, n_keys: int, mask: Tensor | None, places: Tensor | None
    ) -> Tensor | None:
        """The bias of relative positions, where this layer has one, and the mask."""
        if mask is not None:
            mask = mask[..., :n_keys]
            mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
        if not self.has_relative_attention_bias:
            return mask
        bias = self.compute_bias(n_queries, n_keys, cache_position=places)
        return bias if mask is None else bias + mask


FAMILIES: dict[tuple[str, str], type] = {
    ("modernbert", "ModernBertAttention"): _ModernBert,
    ("t5", "T5Attention"): _T5,
}
# A class that asks the registry is not of these releases.
REPLACEMENTS = {
    original: replacement
    for original, replacement in subclasses(FAMILIES, __name__).items()
    if not asks_registry(original)
}
globals().update({x.__name__: x for x in REPLACEMENTS.values()})  # where pickle looks for them


def adapt(module: nn.Module) -> Outcome | None:
    """Replace the attention of this module, not of its children; None if it is none of these."""
    if type(module) in REPLACEMENTS and getattr(module, "rotary_emb", None) is not None:
        return Outcome(False, "built for attn_implementation='flash_attention_2'")
    return swap(module, REPLACEMENTS, DETAIL)


def restore(module: nn.Module) -> bool:
    """Undo adapt; whether there was something to undo."""
    return swap_back(module, REPLACEMENTS)
