"""Longformer's self-attention, and that of LED's encoder: a window and global tokens.

Local queries see the keys of the window and the global tokens, in the projections of both; global
tokens see all keys, through projections of their own (Beltagy et al., 2020). transformers pads the
sequences of these models to a multiple of the window: nothing here needs that, and positions past a
sequence's last token are not computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.led import modeling_led
from transformers.models.longformer import modeling_longformer

from clinattn.integrations.outcome import Outcome
from clinattn.integrations.swap import swap, swap_back, warn_of_attentions
from clinattn.operator.attention import fused_attention

DETAIL = "fused_attention with a window and global tokens"


def is_prefix(is_global: Tensor, n_global: int) -> bool:
    """Returns whether each sequence's global tokens are its first n_global; waits for a device."""
    return bool(is_global[:, :n_global].all())


def merge(o: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Tensor:
    """Attention over the union of two disjoint sets of keys, from that over each.

    o, more: (B, H, N, D); lse, more_lse: (B, H, N), of which one may be -inf in a row, where that
    set holds no key the query sees; both are in rows whose result is not used, which get 0.
    Exact under dropout, too: it zeroes terms p_j v_j of the full softmax, p_j = w p'_j with p'_j of
    the set and w = exp(lse' - lse) from normalisers of the full softmax, which dropout leaves.
    """
    # w = sigmoid(lse - more_lse); the difference of two -inf has neither value nor gradient
    seen, more_seen = lse.isfinite(), more_lse.isfinite()
    both = seen & more_seen
    difference = torch.where(both, lse, 0) - torch.where(both, more_lse, 0)
    w = torch.where(both, difference.sigmoid(), seen.to(lse.dtype))[..., None]
    more_w = torch.where(both, (-difference).sigmoid(), more_seen.to(lse.dtype))[..., None]
    return (w * o + more_w * more).to(o.dtype)


class _Attention(nn.Module):
    """Base of the two classes, which are the same code under two names in transformers."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_global: nn.Linear
    key_global: nn.Linear
    value_global: nn.Linear
    num_heads: int
    head_dim: int
    dropout: float
    one_sided_attn_window_size: int

    forward_parameters = (
        "hidden_states", "attention_mask", "is_index_masked", "is_index_global_attn",
        "is_global_attn", "output_attentions",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """(o,) as the original gives it; its attentions, too, by its own code, with a warning.

        hidden_states: (B, N, E), any N. attention_mask: (B, N), negative = padding, 0 = local,
        positive = global; is_index_masked, is_index_global_attn: (B, N) bool, its two signs.
        """
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(
                hidden_states, attention_mask, is_index_masked, is_index_global_attn,
                is_global_attn, output_attentions,
            )  # fmt: skip
        if attention_mask is None or is_index_masked is None:
            raise ValueError("attention_mask and is_index_masked: got None, expected (B, N)")
        if is_global_attn and is_index_global_attn is None:
            raise ValueError("is_index_global_attn: got None, expected (B, N) with is_global_attn")
        position = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
        ends = torch.where(is_index_masked, 0, position).amax(1)  # (B,), past the last token
        q, k, v = (
            self._heads(projection(hidden_states))
            for projection in (self.query, self.key, self.value)
        )
        local = (attention_mask == 0)[:, None, None]
        if is_global_attn:
            assert is_index_global_attn is not None
            o = self._with_global_tokens(
                hidden_states, q, k, v, local, ends, is_index_masked, is_index_global_attn
            )
        else:
            o = self._merged(self._attend(q, k, v, local, self._window, q_lengths=ends))
        return (o.masked_fill(is_index_masked[..., None], 0),)

    @property
    def _window(self) -> int:
        return self.one_sided_attn_window_size

    def _with_global_tokens(
        self,
        hidden_states: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        local: Tensor,
        ends: Tensor,
        is_masked: Tensor,
        is_global: Tensor,
    ) -> Tensor:
        """Every row (B, N, E), those of the global tokens from their own projections."""
        counts = is_global.sum(1)
        n_global = int(counts.max())
        prefix = is_prefix(is_global, n_global)
        # (B, G): where the global tokens are, in order; beyond its count a sequence has local ones
        slots = is_global.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_global]
        if prefix:
            seen = local | is_global[:, None, None]
            o = self._attend(q, k, v, seen, self._window, q_lengths=ends, global_prefix=n_global)
        else:
            rows = slots[:, None, :, None].expand(-1, self.num_heads, -1, self.head_dim)
            o = merge(
                *self._attend(q, k, v, local, self._window, q_lengths=ends, return_lse=True),
                *self._attend(
                    q, k.gather(2, rows), v.gather(2, rows), q_lengths=ends, kv_lengths=counts,
                    return_lse=True,
                ),
            )  # fmt: skip
        o_global = self._global_rows(hidden_states, slots, counts, is_masked)
        o = self._merged(o)
        if prefix:
            return torch.cat((o_global, o[:, n_global:]), dim=1)
        slot = (is_global.cumsum(1) - 1).clamp(min=0)  # of each global token among its sequence's
        spread = o_global.gather(1, slot[..., None].expand_as(o))
        return torch.where(is_global[..., None], spread, o)

    def _global_rows(
        self, hidden_states: Tensor, slots: Tensor, counts: Tensor, is_masked: Tensor
    ) -> Tensor:
        """Attention of the global tokens, (B, G, E); 0 beyond a sequence's count."""
        embed_dim = hidden_states.shape[2]
        chosen = hidden_states.gather(1, slots[..., None].expand(-1, -1, embed_dim))
        q = self._heads(self.query_global(chosen))
        k, v = (self._heads(p(hidden_states)) for p in (self.key_global, self.value_global))
        return self._merged(self._attend(q, k, v, ~is_masked[:, None, None], q_lengths=counts))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None = None,
        window: int | None = None,
        **more: Any,
    ) -> Any:
        dropout_p = self.dropout if self.training else 0.0
        return fused_attention(q, k, v, seen, dropout_p, window=window, **more)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, E) -> (B, H, N, D)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merged(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, N, E)."""
        return x.transpose(1, 2).flatten(2)


class LongformerSelfAttention(_Attention, modeling_longformer.LongformerSelfAttention):
    """transformers' LongformerSelfAttention in O(N) memory and without chunks."""


class LEDEncoderSelfAttention(_Attention, modeling_led.LEDEncoderSelfAttention):
    """transformers' LEDEncoderSelfAttention in O(N) memory and without chunks."""


REPLACEMENTS: dict[type, type] = {
    modeling_longformer.LongformerSelfAttention: LongformerSelfAttention,
    modeling_led.LEDEncoderSelfAttention: LEDEncoderSelfAttention,
}


def adapt(module: nn.Module) -> Outcome | None:
    """Replace the attention of this module, not of its children; None if it is none of these."""
    return swap(module, REPLACEMENTS, DETAIL)


def restore(module: nn.Module) -> bool:
    """Undoes adapt; returns whether there was something to undo."""
    return swap_back(module, REPLACEMENTS)
