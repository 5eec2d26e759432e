"""The self-attention of XLM and FlauBERT, which give every call, an encoder's too, a cache.

Keys that the mask hides may hold any value; a query that sees none gives 0, where the original
averages.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.flaubert import modeling_flaubert
from transformers.models.xlm import modeling_xlm

from clinattn.integrations.outcome import Outcome
from clinattn.integrations.swap import swap, swap_back, warn_of_attentions
from clinattn.operator.attention import fused_attention

DETAIL = "fused_attention"


class _MultiHeadAttention(nn.Module):
    """Base of the two classes, which are the same code under two names in transformers."""

    q_lin: nn.Linear
    k_lin: nn.Linear
    v_lin: nn.Linear
    out_lin: nn.Linear
    head_dim: int
    layer_id: int
    dropout: float

    forward_parameters = ("input", "mask", "kv", "cache", "output_attentions", "kwargs")

    def forward(
        self,
        input: Tensor,
        mask: Tensor,
        kv: Tensor | None = None,
        cache: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """(o,). input: (B, N, E); mask: (B, K) or (B, N, K), 0 where a key is hidden."""
        if kv is not None:
            raise NotImplementedError("kv: expected None; cross-attention is not served")
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(input, mask, cache=cache, output_attentions=output_attentions)
        q, k, v = (
            projection(input).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_lin, self.k_lin, self.v_lin)
        )
        if cache is not None:
            of_self = cache
            if isinstance(cache, EncoderDecoderCache):
                of_self = cache.self_attention_cache
            k, v = of_self.update(k, v, self.layer_id)
        seen = (mask != 0)[:, None] if mask.dim() == 3 else (mask != 0)[:, None, None]
        o = fused_attention(q, k, v, seen, self.dropout if self.training else 0.0)
        return (self.out_lin(o.transpose(1, 2).flatten(2)),)


class XLMAttention(_MultiHeadAttention, modeling_xlm.MultiHeadAttention):
    """XLM's MultiHeadAttention in O(N) memory."""


class FlaubertAttention(_MultiHeadAttention, modeling_flaubert.MultiHeadAttention):
    """FlauBERT's MultiHeadAttention in O(N) memory."""


REPLACEMENTS: dict[type, type] = {
    modeling_xlm.MultiHeadAttention: XLMAttention,
    modeling_flaubert.MultiHeadAttention: FlaubertAttention,
}
for original, replacement in REPLACEMENTS.items():
    replacement.__name__ = original.__name__  # pickle goes by __qualname__


def adapt(module: nn.Module) -> Outcome | None:
    """Replace the attention of this module, not of its children; None if it is none of these."""
    return swap(module, REPLACEMENTS, DETAIL)


def restore(module: nn.Module) -> bool:
    """Undoes adapt; returns whether there was something to undo."""
    return swap_back(module, REPLACEMENTS)
