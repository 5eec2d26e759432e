"""BERT's pretraining (Devlin et al., 2019): masked tokens, and whether one text follows another."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from clinattn.operator.words.checks import check_tensor

from .config import EncoderConfig
from .heads import HeadOutput, MaskedLanguageModel, Pooler
from .inputs import IGNORE, check_sequence_labels
from .layout import Batch, sequences
from .model import Encoder, init_weights
from .packed_layout import at_least_fp32


@dataclass
class PretrainingOutput(HeadOutput):
    """Result of PretrainingModel.

    loss: that of the masked tokens plus that of the pairs. logits: of tokens.
    masked_loss and next_loss: scalars, None without labels. next_logits: (sequences, 2), for what
    follows (0) and what does not (1).
    """

    masked_loss: Tensor | None
    next_loss: Tensor | None
    next_logits: Tensor

    @property
    def losses(self) -> tuple[Tensor, ...]:
        assert self.masked_loss is not None and self.next_loss is not None
        return self.masked_loss, self.next_loss


class PretrainingModel(nn.Module):
    """A masked language model, and two classes of a sequence by its pooled first token.

    masked: the masked language model, complete by itself.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.masked = MaskedLanguageModel(config)
        self.pooler = Pooler(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.pooler.apply(init_weights)
        self.next_sentence.apply(init_weights)

    @property
    def encoder(self) -> Encoder:
        return self.masked.encoder

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        next_labels: Tensor | None = None,
        **batch: Unpack[Batch],
    ) -> PretrainingOutput:
        """Arguments as in MaskedLanguageModel, and next_labels (sequences,): 0, 1 or -100 for none.

        Labels of both kinds or of neither. Each loss is a mean over its labels, 0 without any.
        Raises ValueError.
        """
        if (labels is None) != (next_labels is None):
            one, other = ("next_labels", "labels") if labels is None else ("labels", "next_labels")
            raise ValueError(f"{other}: got None beside {one}, expected both or neither")
        if next_labels is not None:
            check_tensor("next_labels", next_labels)
            if next_labels.is_floating_point():
                raise TypeError(f"next_labels has dtype {next_labels.dtype}: expected torch.int64")
            given = sequences(input_ids, batch)
            check_sequence_labels("next_labels", next_labels, given, 2, input_ids)
        masked, hidden, layout = self.masked.predict(input_ids, labels, **batch)
        logits = self.next_sentence(self.pooler(layout.first(hidden)))
        if masked.loss is None or next_labels is None:
            return PretrainingOutput(None, masked.logits, None, None, logits)
        total = F.cross_entropy(
            at_least_fp32(logits), next_labels, reduction="sum", ignore_index=IGNORE
        )
        next_loss = total / (next_labels != IGNORE).sum().clamp(min=1)
        return PretrainingOutput(
            masked.loss + next_loss, masked.logits, masked.loss, next_loss, logits
        )
