"""BERT's two tasks at once: masked tokens, and whether the second part follows the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clinattn.encoder import EncoderConfig, PretrainingModel, PretrainingOutput
from clinattn.encoder.heads import IGNORE
from clinattn.workloads.seeds import derived_seed

from .batches import packed
from .objectives import HELD_OUT_EPOCH, Evaluated, LabelledBatch, MaskedTokens
from .pairs import FOLLOWS, Pairs
from .ranks import Ranks


@dataclass(frozen=True)
class MaskedPairs(MaskedTokens):
    """typed: the encoder tells the parts apart by token types."""

    train: Pairs
    held_out: Pairs
    typed: bool

    def model(self, config: EncoderConfig) -> PretrainingModel:
        return PretrainingModel(config)

    def pairs(self, epoch: int) -> Pairs:
        return self.held_out if epoch == HELD_OUT_EPOCH else self.train

    def lengths(self, epoch: int, at: np.ndarray | None = None) -> np.ndarray:
        lengths = self.pairs(epoch).lengths
        return lengths if at is None else lengths[at]

    def batch(self, indices: list[int], epoch: int, device: torch.device) -> LabelledBatch:
        pairs = self.pairs(epoch)
        drawn = [pairs.draw(i, derived_seed("pair", self.seed, epoch, i)) for i in indices]
        masked = [
            self.labelled(tokens, epoch, index)
            for index, (tokens, _, _) in zip(indices, drawn, strict=True)
        ]
        labels = torch.cat([labels for _, labels in masked])
        next_labels = torch.tensor([label for _, _, label in drawn])
        ids, arguments = packed([seen for seen, _ in masked], device)
        arguments["labels"] = labels.to(device)
        arguments["next_labels"] = next_labels.to(device)
        if self.typed:
            arguments["token_types"] = torch.cat([types for _, types, _ in drawn]).to(device)
        counts = tuple(int((x != IGNORE).sum()) for x in (labels, next_labels))
        return LabelledBatch(ids, arguments, counts)

    def score(self, evaluated: Iterator[Evaluated], ranks: Ranks) -> dict[str, Any]:
        """Returns the metrics of masked tokens, with their loss as mlm_loss, and those of pairs.

        nsp_base_rate: the accuracy of always saying what more of the held-out pairs are.
        """
        totals = torch.zeros(4, dtype=torch.float64)  # loss, right, following, labels

        def counting() -> Iterator[Evaluated]:
            for found in evaluated:
                output, labels = found.output, found.batch.arguments["next_labels"]
                assert isinstance(output, PretrainingOutput)
                count = found.batch.labels[1]
                right = (output.next_logits.argmax(-1) == labels).sum()
                following = (labels == FOLLOWS).sum()
                counted = [float(output.losses[1]) * count, float(right), float(following), count]
                totals.add_(torch.tensor(counted, dtype=torch.float64))
                yield found

        masked = super().score(counting(), ranks)
        loss_sum, right, following, count = torch.stack(ranks.gather(totals)).sum(0).tolist()
        pairs = max(count, 1)
        return masked | {
            "loss": masked["loss"] + loss_sum / pairs,
            "mlm_loss": masked["loss"],
            "nsp_loss": loss_sum / pairs,
            "nsp_accuracy": right / pairs,
            "nsp_base_rate": max(following, count - following) / pairs,
        }
