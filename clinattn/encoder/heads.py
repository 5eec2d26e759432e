"""Heads on the packed encoder: masked-language model and sequence classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from .config import EncoderConfig
from .layout import Batch
from .model import Encoder, init_weights, layer_norm, wants_per_sample_gradients

IGNORE = -100  # a label that is not one, as in torch's cross_entropy


@dataclass
class HeadOutput:
    """loss: scalar, None without labels. logits: see the head."""

    loss: Tensor | None
    logits: Tensor


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class PredictionHead(nn.Sequential):
    """Dense, GELU, norm: what BERT and ModernBERT both put before their decoder."""

    def __init__(self, config: EncoderConfig):
        dense = nn.Linear(config.hidden_size, config.hidden_size, config.linear_bias)
        super().__init__(dense, nn.GELU(), layer_norm(config))


class MaskedLanguageModel(nn.Module):
    """Predicts masked tokens; the decoder shares the embedding's weight."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.head = PredictionHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.head.apply(init_weights)
        self.decoder.apply(init_weights)
        self.decoder.weight = self.encoder.embeddings.tokens.weight

    def forward(
        self, input_ids: Tensor, *, labels: Tensor | None = None, **batch: Unpack[Batch]
    ) -> HeadOutput:
        """Arguments as in Encoder.encode; labels: like input_ids, -100 where there is none.

        With labels, logits are (labelled, vocab) in token order, and only those are ever computed;
        the loss is their mean cross entropy, 0 if nothing is labelled. Never label padding.
        Without, they are (T, vocab) or (B, N, vocab). Raises ValueError for labels under Opacus.
        """
        if labels is not None and wants_per_sample_gradients(self):
            raise ValueError(
                "labels: got some under per-sample gradients (Opacus), which logits of labelled "
                "tokens alone have not; expected None, and a loss formed from all logits"
            )
        hidden, layout = self.encoder.encode(input_ids, **batch)
        if labels is None:
            return HeadOutput(None, layout.restore(self.decoder(self.head(hidden))))
        targets = layout.pack(labels).flatten()
        labelled = (targets != IGNORE).nonzero().squeeze(1)
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, labelled)
        logits = self.decoder(self.head(hidden))
        total = F.cross_entropy(_at_least_fp32(logits), targets[labelled], reduction="sum")
        return HeadOutput(total / max(len(labelled), 1), logits)


class SequenceClassifier(nn.Module):
    """Classifies each sequence by its first token ([CLS])."""

    def __init__(self, config: EncoderConfig, num_labels: int):
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels}: expected at least 1")
        self.encoder = Encoder(config)
        self.head = PredictionHead(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.head.apply(init_weights)
        self.classifier.apply(init_weights)

    def forward(
        self, input_ids: Tensor, *, labels: Tensor | None = None, **batch: Unpack[Batch]
    ) -> HeadOutput:
        """Arguments as in Encoder.encode; logits (sequences, num_labels), fp32 loss.

        labels: (sequences,) class numbers for cross entropy, or (sequences, num_labels) real
        targets in 0..1, each label for itself.
        """
        hidden, layout = self.encoder.encode(input_ids, **batch)
        logits = self.classifier(self.dropout(self.head(layout.first(hidden))))
        return HeadOutput(_classification_loss(logits, labels), logits)


def _classification_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    logits = _at_least_fp32(logits)
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: expected {tuple(logits.shape)}"
            )
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)
