"""BigBird's full self-attention, which encoders run on short sequences.

A block-sparse layer cannot be replaced: its queries see a band of blocks and, by head, some drawn
at random. BigBird turns all its layers to full attention for good when it first meets a sequence
too short to be sparse, by new modules around the same projections; the modules that hold them are
made to replace the new ones, too, so that no layer falls back to its own code unseen.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers.models.big_bird import modeling_big_bird

from clinattn.integrations.outcome import Outcome
from clinattn.integrations.swap import swap, swap_back, warn_of_attentions
from clinattn.integrations.transformers.bert_shaped import DECODER, BertShaped, refuse_decoding

DETAIL = "fused_attention"
SPARSE = (
    "block-sparse attention with random blocks is another function; full attention, which BigBird "
    "turns to at its first short sequence, or by set_attention_type('original_full'), is replaced"
)

# True where layers are passed the configuration's output_attentions; else only hooks read it.
TOLD = "output_attentions" in signature(modeling_big_bird.BigBirdAttention.forward).parameters


class BigBirdSelfAttention(BertShaped, modeling_big_bird.BigBirdSelfAttention):
    """transformers' BigBirdSelfAttention of an encoder, without its matrix of probabilities."""

    forward_parameters = (
        "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask",
        "past_key_values", "output_attentions", "kwargs",
    )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(o, probabilities), the latter None unless asked for."""
        refuse_decoding(encoder_hidden_states, past_key_values, kwargs)
        if output_attentions:
            warn_of_attentions(self)
            return modeling_big_bird.BigBirdSelfAttention.forward(
                self, hidden_states, attention_mask, output_attentions=output_attentions
            )
        return self.attend(*self.project(hidden_states), attention_mask), None


class BigBirdAttention(modeling_big_bird.BigBirdAttention):
    """Holds the self-attention: replaces the one that a switch of the attention type makes."""

    forward_parameters = (
        "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask",
        "past_key_values", "output_attentions", "band_mask", "from_mask", "to_mask",
        "from_blocked_mask", "to_blocked_mask", "kwargs",
    )  # fmt: skip

    def set_attention_type(self, value: str, layer_idx: int | None = None) -> None:
        super().set_attention_type(value, layer_idx)
        adapt(self.self)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not TOLD:
            kwargs.setdefault("output_attentions", self.config.output_attentions)
        return super().forward(*args, **kwargs)


REPLACEMENTS: dict[type, type] = {
    modeling_big_bird.BigBirdSelfAttention: BigBirdSelfAttention,
}
HOLDERS: dict[type, type] = {modeling_big_bird.BigBirdAttention: BigBirdAttention}


def adapt(module: nn.Module) -> Outcome | None:
    """Replace the attention of this module, not of its children; None if it is none of these.

    A BigBirdAttention, which computes none itself, is made to follow switches and gives None.
    """
    if isinstance(module, modeling_big_bird.BigBirdBlockSparseAttention):
        return Outcome(False, SPARSE)
    if isinstance(module, modeling_big_bird.BigBirdAttention):
        followed = swap(module, HOLDERS, DETAIL)
        return followed if followed is not None and not followed.replaced else None
    if isinstance(module, modeling_big_bird.BigBirdSelfAttention) and module.is_decoder:
        return Outcome(False, DECODER)
    return swap(module, REPLACEMENTS, DETAIL)


def restore(module: nn.Module) -> bool:
    """Undoes adapt; returns whether there was something to undo."""
    return swap_back(module, REPLACEMENTS) or swap_back(module, HOLDERS)
