"""Self-attention of encoders that are BERT in their maths, with code of their own in transformers.

softmax(q.k / sqrt(D) + mask) v, at most with a rotation or a bias of positions before: each class
listed here was read, and is held by a test against its own code. Where a mask of the keys alone has
the lowest number of its dtype, the key is hidden: it may hold any value, and a sequence of padding
alone gives 0, not an average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clinattn.integrations.outcome import Outcome
from clinattn.integrations.swap import subclasses, swap, swap_back, warn_of_attentions
from clinattn.operator.attention import fused_attention

DETAIL = "fused_attention"


class BertShaped(nn.Module):
    """Parts that the classes have in common: three projections, heads, dropout."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    attention_head_size: int
    forward_parameters: tuple[str, ...]

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, E) -> (B, H, N, D)."""
        return x.unflatten(2, (-1, self.attention_head_size)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, D) each, mask added to the scores -> (B, N, E)."""
        if mask is not None and mask.shape[-2] == 1:
            mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        return fused_attention(q, k, v, mask, dropout_p).transpose(1, 2).flatten(2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))


class _Bert(BertShaped):
    """Returns (o, probabilities), the latter None unless asked for."""

    forward_parameters = (
        "hidden_states", "attention_mask", "encoder_hidden_states", "past_key_values",
        "output_attentions", "kwargs",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        refuse_decoding(encoder_hidden_states, past_key_values, kwargs)
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(
                hidden_states, attention_mask, output_attentions=output_attentions
            )
        return self.attend(*self.project(hidden_states), attention_mask), None


class _RoFormer(BertShaped):
    """Queries and keys, and values if the configuration says so, are rotated first."""

    forward_parameters = (
        "hidden_states", "attention_mask", "sinusoidal_pos", "encoder_hidden_states",
        "past_key_values", "output_attentions", "kwargs",
    )  # fmt: skip
    rotary_value: bool
    apply_rotary_position_embeddings: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sinusoidal_pos: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        refuse_decoding(encoder_hidden_states, past_key_values, kwargs)
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(
                hidden_states, attention_mask, sinusoidal_pos, output_attentions=output_attentions
            )
        q, k, v = self.project(hidden_states)
        if sinusoidal_pos is not None:
            rotated = (q, k, v) if self.rotary_value else (q, k)
            q, k, *rest = self.apply_rotary_position_embeddings(sinusoidal_pos, *rotated)
            v = rest[0] if rest else v
        return self.attend(q, k, v, attention_mask), None


class _Tapas(_Bert):
    """Returns (o,)."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        return tuple(x for x in super().forward(*args, **kwargs) if x is not None)


class _VisualBert(BertShaped):
    forward_parameters = ("hidden_states", "attention_mask", "output_attentions")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(hidden_states, attention_mask, output_attentions)
        return (self.attend(*self.project(hidden_states), attention_mask),)


class _MPNet(BertShaped):
    """Has its output projection, too, and one bias of relative positions for all layers."""

    forward_parameters = (
        "hidden_states", "attention_mask", "position_bias", "output_attentions", "kwargs"
    )  # fmt: skip
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        if output_attentions:
            warn_of_attentions(self)
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions)
        q, k, v = (self.heads(p(hidden_states)) for p in (self.q, self.k, self.v))
        if position_bias is None or attention_mask is None:
            mask = attention_mask if position_bias is None else position_bias
        else:
            mask = position_bias + attention_mask
        return (self.o(self.attend(q, k, v, mask)),)


def refuse_decoding(
    encoder_hidden_states: Tensor | None, past_key_values: Any, kwargs: dict[str, Any]
) -> None:
    """Raises NotImplementedError for arguments of decoders: adapt leaves decoders as they are."""
    past_key_values = kwargs.get("cache", past_key_values)  # its name from transformers 5.24 on
    if encoder_hidden_states is not None or past_key_values is not None:
        raise NotImplementedError(
            "encoder_hidden_states, past_key_values: expected None in an encoder"
        )


FAMILIES: dict[tuple[str, str], type[BertShaped]] = {
    ("megatron_bert", "MegatronBertSelfAttention"): _Bert,
    ("mpnet", "MPNetSelfAttention"): _MPNet,
    ("rembert", "RemBertSelfAttention"): _Bert,
    ("roformer", "RoFormerSelfAttention"): _RoFormer,
    ("tapas", "TapasSelfAttention"): _Tapas,
    ("visual_bert", "VisualBertSelfAttention"): _VisualBert,
}


REPLACEMENTS = subclasses(FAMILIES, __name__)
globals().update({x.__name__: x for x in REPLACEMENTS.values()})  # where pickle looks for them


def adapt(module: nn.Module) -> Outcome | None:
    """Replace the attention of this module, not of its children; None if it is none of these."""
    if type(module) in REPLACEMENTS and getattr(module, "is_decoder", False):
        return Outcome(False, DECODER)
    return swap(module, REPLACEMENTS, DETAIL)


DECODER = "a decoder: causal masks, caches and cross-attention stay with its own code"


def restore(module: nn.Module) -> bool:
    """Undoes adapt; returns whether there was something to undo."""
    return swap_back(module, REPLACEMENTS)
