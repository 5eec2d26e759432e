"""Heads on the packed encoder: masked and causal language model, sequence classifier."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from clinattn.operator.words.scalars import FAR, as_int

from .checkpoints import Pretrained, load
from .config import EncoderConfig
from .embeddings import make_norm
from .inputs import IGNORE, check_sequence_labels, check_token_labels
from .layout import Batch, Layout, sequences
from .model import Encoder, init_weights, linear_of, wants_per_sample_gradients
from .packed_layout import at_least_fp32


@dataclass
class HeadOutput:
    """Result of a head.

    loss: scalar, None without labels. logits: see the head.
    """

    loss: Tensor | None
    logits: Tensor

    @property
    def losses(self) -> tuple[Tensor, ...]:
        """The means over labels that `loss` is the sum of."""
        assert self.loss is not None
        return (self.loss,)


class PredictionHead(nn.Sequential):
    """Dense, GELU, norm: what BERT and ModernBERT both put before their decoder."""

    def __init__(self, config: EncoderConfig):
        dense = nn.Linear(config.hidden_size, config.hidden_size, config.linear_bias)
        super().__init__(dense, nn.GELU(), make_norm(config))


class Pooler(nn.Sequential):
    """Dense, tanh: what BERT puts before its classifier."""

    def __init__(self, config: EncoderConfig):
        super().__init__(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())


class MaskedLanguageModel(Pretrained):
    """Predicts masked tokens; the decoder shares the embedding's weight."""

    task = "masked"

    def __init__(self, config: EncoderConfig):
        super().__init__()
        _check_has_vocabulary(config)
        self.encoder = Encoder(config)
        self.head = PredictionHead(config)
        self.linear = linear_of(config)
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
        return self.predict(input_ids, labels, **batch)[0]

    def predict(
        self, input_ids: Tensor, labels: Tensor | None, **batch: Unpack[Batch]
    ) -> tuple[HeadOutput, Tensor, Layout]:
        """forward's output, and what Encoder.encode gave, for another head beside this one."""
        _check_labels(self, self.encoder.config, input_ids, labels, batch)
        hidden, layout = self.encoder.encode(input_ids, **batch)
        if labels is None:
            return HeadOutput(None, layout.restore(self.decode(hidden))), hidden, layout
        return _language_loss(self.decode, hidden, layout.pack(labels), layout), hidden, layout

    def decode(self, hidden: Tensor) -> Tensor:
        return self.linear(self.decoder, self.head(hidden))


class CausalLanguageModel(Pretrained):
    """Predicts each next token of a sequence; the decoder is the embedding's weight."""

    task = "causal"

    def __init__(self, config: EncoderConfig):
        super().__init__()
        _check_has_vocabulary(config)
        if not config.causal:
            raise ValueError("causal=False: expected an encoder of causal=True")
        self.encoder = Encoder(config)
        self.linear = linear_of(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = self.encoder.embeddings.tokens.weight

    def forward(
        self, input_ids: Tensor, *, labels: Tensor | None = None, **batch: Unpack[Batch]
    ) -> HeadOutput:
        """Arguments as in Encoder.encode; labels: like input_ids, mostly they; -100 for none.

        The label of a token is held against what was predicted from the tokens before it in its
        own sequence: the first of a sequence is never a target, and padding never is.
        With labels, logits are (targets, vocab) in token order, those at the tokens before the
        targets, and the loss is their mean cross entropy, 0 if there is none. Without, they are
        (T, vocab) or (B, N, vocab). Raises ValueError for labels under Opacus.
        """
        _check_labels(self, self.encoder.config, input_ids, labels, batch)
        hidden, layout = self.encoder.encode(input_ids, **batch)
        if labels is None:
            return HeadOutput(None, layout.restore(self.decode(hidden)))
        targets = layout.following(layout.pack(labels), IGNORE)
        return _language_loss(self.decode, hidden, targets, layout)

    def decode(self, hidden: Tensor) -> Tensor:
        return self.linear(self.decoder, hidden)


def _check_has_vocabulary(config: EncoderConfig) -> None:
    EncoderConfig.check(config)
    if config.channels:
        raise ValueError(f"channels={config.channels}: a language model expects a vocabulary")


def _check_labels(
    model: nn.Module, config: EncoderConfig, input_ids: Any, labels: Any, batch: Batch
) -> None:
    if labels is None:
        return
    padding = batch.get("lengths"), batch.get("attention_mask")
    check_token_labels(labels, input_ids, *padding, config.vocab_size)
    if wants_per_sample_gradients(model):
        raise ValueError(
            "labels: got some under per-sample gradients (Opacus), which logits of labelled "
            "tokens alone have not; expected None, and a loss formed from all logits"
        )


def _language_loss(
    decode: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, layout: Layout
) -> HeadOutput:
    targets = targets.flatten()
    labelled = (targets != IGNORE).nonzero().squeeze(1)
    logits = decode(hidden.reshape(-1, hidden.shape[-1]).index_select(0, labelled))
    total = F.cross_entropy(at_least_fp32(logits), targets[labelled], reduction="sum")
    return HeadOutput(total / layout.counted(len(labelled)), logits)


class SequenceClassifier(Pretrained):
    """Classifies each sequence by its first or last token or their mean, as config.pooling says."""

    task = "classifier"

    def __init__(self, config: EncoderConfig, num_labels: int):
        super().__init__()
        EncoderConfig.check(config)
        num_labels = as_int("num_labels", num_labels)
        if not 1 <= num_labels <= FAR:
            raise ValueError(f"num_labels={num_labels}: expected at least 1")
        if config.causal and config.pooling == "first":
            raise ValueError(
                "pooling='first': a causal encoder's first token sees no other, "
                "expected 'mean' or 'last'"
            )
        self.encoder = Encoder(config)
        self.head = PredictionHead(config) if config.classifier == "norm" else Pooler(config)
        dropout_p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout if dropout_p is None else dropout_p)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.head.apply(init_weights)
        self.classifier.apply(init_weights)

    def forward(
        self, inputs: Tensor, *, labels: Tensor | None = None, **batch: Unpack[Batch]
    ) -> HeadOutput:
        """Arguments as in Encoder.encode; logits (sequences, num_labels), fp32 loss.

        labels: (sequences,) class numbers for cross entropy, or (sequences, num_labels) real
        targets in 0..1, each label for itself.
        """
        if labels is not None:
            classes = self.classifier.out_features
            check_sequence_labels("labels", labels, sequences(inputs, batch), classes, inputs)
        logits = self.of_pooled(self.pooled(*self.encoder.encode(inputs, **batch)))
        return HeadOutput(_classification_loss(logits, labels), logits)

    def pooled(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Pools an encoder's states to those that the head reads, (sequences, hidden)."""
        pool = {"first": layout.first, "mean": layout.mean, "last": layout.last}
        return pool[self.encoder.config.pooling](hidden)

    def of_pooled(self, pooled: Tensor) -> Tensor:
        """Logits (sequences, num_labels) of pooled states."""
        return self.classifier(self.dropout(self.head(pooled)))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], num_labels: int | None = None, **overrides: Any
    ) -> Self:
        """Loads a folder as other models do; num_labels: for a folder without a classifier."""
        return load(cls, folder, overrides, num_labels)


def _classification_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    logits = at_least_fp32(logits)
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)
