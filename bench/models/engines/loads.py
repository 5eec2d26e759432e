"""Loads of the benchmark: a model, the lengths of its sequences, and the size of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers

from clinattn.tools.benchmark.workload import profile_workload

# Published sizes: huggingface.co/emilyalsentzer/Bio_ClinicalBERT, answerdotai/ModernBERT-base.
MODELS = {
    "BERT base": (transformers.BertConfig, {"vocab_size": 28_996}),
    "ModernBERT base": (transformers.ModernBertConfig, {}),
}


@dataclass(frozen=True)
class Load:
    """sequences at the lengths of a clinical profile, cut at cap tokens, batch of them at once.

    layers: of the model that is run; all of them take the same time but for ModernBERT's, of which
    every third, from the first on, sees all tokens. Three are the fewest in which a local layer
    reads another local one. apart: start and memory are measured. cut: lengths are of the profile
    to cut x cap tokens, divided by it, so that the share of padding stays.
    """

    name: str
    words: str
    model: str
    profile: str
    cap: int
    sequences: int
    batch: int
    layers: int
    apart: bool = False
    cut: int = 1

    @property
    def title(self) -> str:
        return self.words.format(cap=f"{self.cap:,}")

    def drawn(self) -> list[np.ndarray]:
        """Token ids (N,) of each sequence: lengths at evenly spaced quantiles, in random order."""
        work = profile_workload(self.profile, self.cap * self.cut, vocab_size(self.model), seed=0)
        found = [work.tokens(i).numpy() for i in work.sample(self.sequences, seed=0)]
        return [ids[: max(1, len(ids) // self.cut)] for ids in found]

    def with_layers(self, layers: int) -> Load:
        return replace(self, layers=layers)

    def shared(self, share: int) -> Load:
        """Returns a `share`-th part of the load, in at most two batches where it has several."""
        sequences = max(self.sequences // share, min(self.sequences, 2))
        batch = self.batch if share == 1 else min(self.batch, max(sequences // 2, 1))
        return replace(self, sequences=sequences, batch=batch)

    def quick(self) -> Load:
        """Returns one layer of BERT, or notes cut to a quarter, without start and memory."""
        if self.model == BERT:
            return replace(self, layers=1, apart=False)
        return replace(self, cap=self.cap // QUICK_CUT, cut=QUICK_CUT, apart=False)


BERT, MODERNBERT = MODELS
QUICK_SHARE, QUICK_CUT = 4, 4
LOADS = (
    Load("full", "{cap} tokens, no padding", BERT, "fixed", 512, 8, 8, 2, apart=True),
    Load("chunks", "chunks of notes of {cap} tokens", BERT, "note_chunks", 128, 64, 32, 2),
    Load("timelines", "timelines to {cap} tokens", BERT, "ehr_population", 512, 64, 16, 2),
    Load("notes", "notes to {cap} tokens", MODERNBERT, "note_discharge", 4096, 16, 8, 3),
    Load("note", "one note of {cap} tokens", MODERNBERT, "fixed", 8192, 1, 1, 3, apart=True),
)


def vocab_size(model: str) -> int:
    return config(model, None).vocab_size


def published_layers(model: str) -> int:
    return config(model, None).num_hidden_layers


@cache
def config(model: str, layers: int | None) -> transformers.PretrainedConfig:
    """The configuration at its published sizes, with fewer layers if given."""
    kind, words = MODELS[model]
    return kind(**words, **({} if layers is None else {"num_hidden_layers": layers}))


def write_model(model: str, layers: int, folder: Path) -> None:
    """Saves the model in fp32 with random weights, the same for the same arguments."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    made = transformers.AutoModel.from_config(config(model, layers))
    made.save_pretrained(folder)
