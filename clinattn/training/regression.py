"""Prediction of a number: an encoder with one output, its loss, and its figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clinattn.encoder import EncoderConfig, HeadOutput, SequenceClassifier

from .batches import packed
from .data import Corpus
from .objectives import Evaluated, LabelledBatch, split
from .ranks import Ranks


class Regressor(SequenceClassifier):
    """The classifier's encoder and head with one output, a number."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config, 1)

    def forward(
        self, inputs: Tensor, *, labels: Tensor | None = None, **batch: Any
    ) -> HeadOutput:
        """Arguments as in Encoder.encode; logits (sequences, 1). labels: (sequences,) real.

        The loss is the mean squared error, in fp32 or more.
        """
        output = super().forward(inputs, **batch)
        if labels is None:
            return output
        wide = torch.promote_types(output.logits.dtype, torch.float32)
        loss = F.mse_loss(output.logits[:, 0].to(wide), labels.to(wide))
        return HeadOutput(loss, output.logits)


@dataclass(frozen=True)
class Regression:
    """Numbers of task labels, standardised by the training sequences; an Objective."""

    corpus: Corpus

    def model(self, config: EncoderConfig) -> Regressor:
        return Regressor(config)

    def lengths(self, epoch: int, at: np.ndarray | None = None) -> np.ndarray:
        return split(self.corpus, epoch).lengths(at)

    def batch(self, indices: list[int], epoch: int, device: torch.device) -> LabelledBatch:
        examples = [split(self.corpus, epoch)[index] for index in indices]
        ids, arguments = packed(examples, device)
        mean, scale = self._scale()
        labels = torch.tensor([x.label for x in examples], dtype=torch.float64)
        arguments["labels"] = ((labels - mean) / scale).to(device)
        return LabelledBatch(ids, arguments, (len(examples),))

    def score(self, evaluated: Iterator[Evaluated], ranks: Ranks) -> dict[str, Any]:
        """mse, mae and r2 in the units of the labels, beside what knowing no sequence gives.

        base_mse, base_mae: of always saying the mean of the training split. r2: 1 less the squared
        error over that of the mean of the sequences scored; None where these are all the same.
        """
        mean, scale = self._scale()
        share = [
            (index, float(x))
            for indices, _, output in evaluated
            for index, x in zip(indices, output.logits[:, 0].cpu().double(), strict=True)
        ]
        found = dict(item for part in ranks.gather(share) for item in part)
        labels = torch.tensor([x.label for x in self.corpus.held_out], dtype=torch.float64)
        said = torch.tensor([found[i] for i in range(len(labels))], dtype=torch.float64)
        error, base = said * scale + mean - labels, mean - labels
        spread = float((labels - labels.mean()).square().sum())
        return {
            "loss": float((error / scale).square().mean()),
            "mse": float(error.square().mean()),
            "base_mse": float(base.square().mean()),
            "mae": float(error.abs().mean()),
            "base_mae": float(base.abs().mean()),
            "r2": 1 - float(error.square().sum()) / spread if spread else None,
        }

    def _scale(self) -> tuple[float, float]:
        target = self.corpus.target
        assert target is not None and target.mean is not None and target.scale is not None
        return target.mean, target.scale
