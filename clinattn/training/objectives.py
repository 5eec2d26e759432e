"""Objectives of training: each has its head, its batches with labels, and its held-out score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from clinattn.encoder import (
    CausalLanguageModel,
    EncoderConfig,
    HeadOutput,
    MaskedLanguageModel,
    SequenceClassifier,
)
from clinattn.encoder.heads import IGNORE
from clinattn.workloads.seeds import derived_seed

from .batches import packed
from .data import Corpus
from .examples import Examples
from .masking import mask_tokens
from .metrics import auroc
from .ranks import Ranks
from .sequences import Tokens
from .windows import by_note

HELD_OUT_EPOCH = -1  # its masks are drawn once, and are those of no training epoch


class LabelledBatch(NamedTuple):
    """Arguments of a model's forward, and over how many labels each of its losses is the mean."""

    ids: Tensor
    arguments: dict[str, Any]
    labels: tuple[int, ...]

    def run(self, model: nn.Module) -> HeadOutput:
        return model(self.ids, **self.arguments)


class Evaluated(NamedTuple):
    """A held-out batch: indices of sequences, inputs of the model, and its output."""

    indices: list[int]
    batch: LabelledBatch
    output: HeadOutput


class Objective(Protocol):
    def model(self, config: EncoderConfig) -> nn.Module: ...

    def lengths(self, epoch: int, at: np.ndarray | None = None) -> np.ndarray:
        """Tokens of each sequence, or of those `at` some numbers (N,), as batches have them."""

    def batch(self, indices: list[int], epoch: int, device: torch.device) -> LabelledBatch:
        """A batch of the training split, or of the held-out one for HELD_OUT_EPOCH."""

    def score(self, evaluated: Iterator[Evaluated], ranks: Ranks) -> dict[str, Any]:
        """Figures over all held-out batches, from this rank's share of them."""


@dataclass(frozen=True)
class MaskedTokens:
    corpus: Corpus
    share: float
    seed: int

    def model(self, config: EncoderConfig) -> nn.Module:
        return MaskedLanguageModel(config)

    def lengths(self, epoch: int, at: np.ndarray | None = None) -> np.ndarray:
        return split(self.corpus, epoch).lengths(at)

    def batch(self, indices: list[int], epoch: int, device: torch.device) -> LabelledBatch:
        examples = split(self.corpus, epoch)
        drawn = [self.labelled(examples[index], epoch, index) for index in indices]
        labels = torch.cat([labels for _, labels in drawn])
        ids, arguments = packed([seen for seen, _ in drawn], device)
        arguments["labels"] = labels.to(device)
        return LabelledBatch(ids, arguments, (int((labels != IGNORE).sum()),))

    def labelled(self, tokens: Tokens, epoch: int, index: int) -> tuple[Tokens, Tensor]:
        """Tokens of a sequence as the model sees them, and their labels.

        A hidden or replaced token has no value, since the value would tell the code.
        """
        seed = derived_seed("mask", self.seed, epoch, index)
        ordinary = self.corpus.ordinary()
        seen, labels = mask_tokens(tokens.ids, self.share, self.corpus.mask, ordinary, seed)
        values = tokens.values
        if values is not None:
            values = values.masked_fill(seen != tokens.ids, float("nan"))
        return Tokens(seen, tokens.days, values), labels

    def score(self, evaluated: Iterator[Evaluated], ranks: Ranks) -> dict[str, Any]:
        """loss and accuracy on labels; unigram_entropy: the least loss without any context."""
        totals = torch.zeros(3, dtype=torch.float64)
        for _, batch, output in evaluated:
            targets = batch.arguments["labels"]
            right = output.logits.argmax(-1) == targets[targets != IGNORE]
            loss, labels = float(output.losses[0]), batch.labels[0]
            counted = [loss * labels, float(right.sum()), labels]
            totals += torch.tensor(counted, dtype=torch.float64)
        loss_sum, right_count, count = torch.stack(ranks.gather(totals)).sum(0).tolist()
        return {
            "loss": loss_sum / max(count, 1),
            "accuracy": right_count / max(count, 1),
            "unigram_entropy": self.corpus.unigram_entropy,
        }


@dataclass(frozen=True)
class NextTokens(MaskedTokens):
    """Predicts every token from those before it, but no special ones such as [CLS]."""

    def model(self, config: EncoderConfig) -> nn.Module:
        return CausalLanguageModel(config)

    def labelled(self, tokens: Tokens, epoch: int, index: int) -> tuple[Tokens, Tensor]:
        return tokens, tokens.ids.masked_fill(~self.corpus.ordinary()[tokens.ids], IGNORE)


@dataclass(frozen=True)
class Classification:
    """Classes of sequences; windows of a note are trained one by one, and scored by note."""

    corpus: Corpus
    pool: str = "mean"

    def model(self, config: EncoderConfig) -> SequenceClassifier:
        return SequenceClassifier(config, len(self.corpus.classes))

    def lengths(self, epoch: int, at: np.ndarray | None = None) -> np.ndarray:
        return split(self.corpus, epoch).lengths(at)

    def batch(self, indices: list[int], epoch: int, device: torch.device) -> LabelledBatch:
        examples = [split(self.corpus, epoch)[index] for index in indices]
        ids, arguments = packed(examples, device)
        arguments["labels"] = torch.tensor([example.label for example in examples], device=device)
        return LabelledBatch(ids, arguments, (len(examples),))

    def score(self, evaluated: Iterator[Evaluated], ranks: Ranks) -> dict[str, Any]:
        """loss, accuracy, and AUROC of two classes, beside what knowing no sequence gives.

        base_rate: the accuracy of always saying the most frequent class of the training split.
        base_loss: the loss of always saying its class frequencies.
        """
        share = [
            (index, logits)
            for indices, _, output in evaluated
            for index, logits in zip(indices, output.logits.cpu().double(), strict=True)
        ]
        found = dict(item for part in ranks.gather(share) for item in part)
        logits = by_note(
            torch.stack([found[index] for index in range(len(self.corpus.held_out))]),
            self.corpus.held_out,
            self.pool,
        )
        labels, trained = (
            torch.from_numpy(examples.labels()[examples.first()])
            for examples in (self.corpus.held_out, self.corpus.train)
        )
        frequency = torch.bincount(trained, minlength=len(self.corpus.classes)).double()
        base = (frequency / frequency.sum()).log()
        figures: dict[str, float | None] = {
            "loss": float(nn.functional.cross_entropy(logits, labels)),
            "base_loss": float(-base[labels].mean()),
            "accuracy": _share(logits.argmax(1) == labels),
            "base_rate": _share(labels == frequency.argmax()),
        }
        if len(self.corpus.classes) == 2:
            figures["auroc"] = auroc(logits[:, 1] - logits[:, 0], labels == 1)
        return figures


def split(corpus: Corpus, epoch: int) -> Examples:
    return corpus.held_out if epoch == HELD_OUT_EPOCH else corpus.train


def _share(right: Tensor) -> float:
    return float(right.double().mean()) if len(right) else math.nan
