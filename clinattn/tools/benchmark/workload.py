"""Workloads of the benchmark: token sequences with masked-LM labels, and a fair sample of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clinattn.encoder.heads import IGNORE
from clinattn.workloads import PROFILES, SPECIAL_TOKENS, read_meds, sample_lengths
from clinattn.workloads.meds import unknown_share
from clinattn.workloads.vocabulary import CLS, MASK

MASKED_SHARE = 0.3  # ModernBERT's; BERT masked 0.15
PROFILE_POOL = 2000  # sequences drawn from a length profile, of which a sample is run


class Example(NamedTuple):
    """A sequence, [CLS] first, none of it padding; each tensor (N,) int64."""

    ids: Tensor
    masked_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Workload:
    """Sequence lengths and how to get the tokens of any of them."""

    name: str
    source: str
    lengths: np.ndarray  # (sequences,)
    vocab_size: int
    tokens: list[Tensor]
    unknown_share: float | None = None

    def example(self, index: int, seed: int) -> Example:
        """The sequence with MASKED_SHARE of its tokens, never [CLS], masked, as the seed draws."""
        ids = self.tokens[index]
        generator = torch.Generator().manual_seed(seed + index)
        masked = torch.rand(len(ids), generator=generator) < MASKED_SHARE
        masked[0] = False
        return Example(ids, ids.masked_fill(masked, MASK), ids.masked_fill(~masked, IGNORE))

    def sample(self, count: int, seed: int) -> list[int]:
        """`count` sequences whose lengths lie at evenly spaced quantiles, in random order."""
        order = np.argsort(self.lengths, kind="stable")
        picks = ((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)
        return np.random.default_rng(seed).permutation(order[picks]).tolist()


def meds_workload(meds_dir: str | Path, max_tokens: int) -> Workload:
    """Every patient of a MEDS folder, cut to max_tokens. Raises MedsError for a bad folder."""
    dataset = read_meds(meds_dir)
    return Workload(
        name="meds",
        source=f"MEDS folder {Path(meds_dir).resolve().name}, {len(dataset)} patients",
        lengths=dataset.lengths(max_tokens),
        vocab_size=len(dataset.vocabulary),
        tokens=[dataset.timeline(i, max_tokens).token_ids for i in range(len(dataset))],
        unknown_share=unknown_share(dataset),
    )


def profile_workload(profile: str, max_tokens: int, vocab_size: int, seed: int) -> Workload:
    """Random tokens at the lengths of a clinical profile."""
    lengths = sample_lengths(profile, PROFILE_POOL, max_tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for length in lengths.tolist():
        ids = torch.randint(len(SPECIAL_TOKENS), vocab_size, (length,), generator=generator)
        ids[0] = CLS
        tokens.append(ids)
    return Workload(
        name=profile,
        source=f"length profile {profile}: {PROFILES[profile].description}",
        lengths=lengths,
        vocab_size=vocab_size,
        tokens=tokens,
    )


def shortened(examples: list[Example], max_tokens: int) -> list[Example]:
    """The examples cut in proportion, the longest to max_tokens: their padding share stays."""
    longest = max(len(example.ids) for example in examples)
    keep = [max(2, len(e.ids) * min(max_tokens, longest) // longest) for e in examples]
    return [Example(*(x[:n] for x in e)) for e, n in zip(examples, keep, strict=True)]
