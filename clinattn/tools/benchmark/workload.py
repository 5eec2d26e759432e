"""Workloads of the benchmark: sequences of a source with masked-LM labels, and a fair sample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clinattn.training.masking import mask_tokens
from clinattn.workloads.profiles import profile_source
from clinattn.workloads.seeds import derived_seed
from clinattn.workloads.source import Source

MASKED_SHARE = 0.3  # ModernBERT's; BERT masked 0.15


class MaskedExample(NamedTuple):
    """A sequence, [CLS] first, none of it padding; each tensor (N,) int64."""

    ids: Tensor
    masked_ids: Tensor
    labels: Tensor


class Workload:
    """The sequences of a source, cut to max_tokens: their lengths, and each as an example."""

    def __init__(self, source: Source, max_tokens: int):
        self.source, self.max_tokens = source, max_tokens
        self.lengths = source.lengths(max_tokens)  # (sequences,)
        self.ordinary = torch.from_numpy(source.vocabulary.ordinary())

    def tokens(self, index: int) -> Tensor:
        """Token ids (N,) of a sequence."""
        return self.source.sequence(index, self.max_tokens)

    def example(self, index: int, seed: int) -> MaskedExample:
        """The sequence as training masks it in its first epoch, MASKED_SHARE of it."""
        ids = self.tokens(index)
        drawn = derived_seed("mask", seed, 0, index)
        mask = self.source.vocabulary.mask
        return MaskedExample(ids, *mask_tokens(ids, MASKED_SHARE, mask, self.ordinary, drawn))

    def sample(self, count: int, seed: int) -> list[int]:
        """`count` sequences whose lengths lie at evenly spaced quantiles, in random order."""
        order = np.argsort(self.lengths, kind="stable")
        picks = ((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)
        return np.random.default_rng(seed).permutation(order[picks]).tolist()


def profile_workload(profile: str, max_tokens: int, vocab_size: int, seed: int) -> Workload:
    """Random tokens at the lengths of a clinical profile."""
    return Workload(profile_source(profile, max_tokens, vocab_size, seed), max_tokens)


def shortened(examples: list[MaskedExample], max_tokens: int) -> list[MaskedExample]:
    """The examples cut in proportion, the longest to max_tokens: their padding share stays."""
    longest = max(len(example.ids) for example in examples)
    keep = [max(2, len(e.ids) * min(max_tokens, longest) // longest) for e in examples]
    return [MaskedExample(*(x[:n] for x in e)) for e, n in zip(examples, keep, strict=True)]
