"""Models that predict for many sequences at once: packed encoders, and padded ones of transformers.

On the CPU a sequence gives the same bits alone and among others, in the packed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clinattn.encoder import SequenceClassifier
from clinattn.operator.packing import batch_by_tokens
from clinattn.training.batches import packed
from clinattn.training.sequences import Tokens

# Products of few rows are summed in an order of their own (MKL: below four a thread; the compiled
# layers of fp32: below 256), so there are always whole multiples of so many.
ROWS = 256


class Outputs(NamedTuple):
    """logits: (S, classes) fp64, None of a model without classes. states: (S, hidden) fp32.

    states: the mean of the last hidden states of a sequence.
    """

    logits: Tensor | None
    states: Tensor


class Model(Protocol):
    def batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Sequences in batches of at most max_tokens, or of one that is longer."""

    def __call__(self, sequences: Sequence[Tokens]) -> Outputs: ...


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def placed(module: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """The module in eval mode on the device, with weights of fp32, or fp64 where dtype says so."""
    return module.to(device, torch.float64 if dtype == "float64" else torch.float32).eval()


@dataclass(frozen=True)
class PackedModel:
    """An encoder of clinattn, with or without a classifier, which computes in the weights' dtype.

    dtype: a name of settings.DTYPES.
    """

    module: Any
    device: torch.device
    dtype: str

    @property
    def weights(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        return batch_by_tokens(lengths, max(max_tokens, *lengths))

    def __call__(self, sequences: Sequence[Tokens]) -> Outputs:
        count, logits = len(sequences), None
        ids, arguments = packed([*sequences, *filler(sequences)], self.device)
        encoder = getattr(self.module, "encoder", self.module)
        with torch.inference_mode():
            with autocast(self.device, self.dtype):
                hidden, layout = encoder.encode(ids, **arguments)
            if isinstance(self.module, SequenceClassifier):
                # bf16 would make many probabilities equal
                pooled = self.module.pooled(hidden, layout)[:count].to(self.weights)
                pooled = F.pad(pooled, (0, 0, 0, -count % ROWS))
                logits = self.module.of_pooled(pooled)[:count].double().cpu()
            states = layout.mean(hidden)[:count].float().cpu()
        return Outputs(logits, states)


def filler(sequences: Sequence[Tokens]) -> list[Tokens]:
    """Sequences of first tokens that fill a batch up to a multiple of ROWS tokens.

    None is longer than the longest of the batch.
    """
    missing, longest = -sum(map(len, sequences)) % ROWS, max(map(len, sequences))
    lengths = [min(longest, missing - start) for start in range(0, missing, longest)]
    return [sequences[0].take(torch.zeros(n, dtype=torch.int64)) for n in lengths]


@dataclass(frozen=True)
class PaddedModel:
    """A model of transformers.

    pad: the id of padding, None where sequences are computed alone. states: whether any are asked
    for, since transformers keeps those of all layers. masked: the model takes an attention_mask.
    """

    module: Any
    classifier: bool
    pad: int | None
    states: bool
    masked: bool
    device: torch.device
    dtype: str

    def batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        if self.pad is None or not self.masked:
            return [[i] for i in range(len(lengths))]
        return batch_by_tokens(lengths, max(max_tokens, *lengths), padded=True)

    def __call__(self, sequences: Sequence[Tokens]) -> Outputs:
        ids = pad_sequence(
            [x.ids for x in sequences], batch_first=True, padding_value=self.pad or 0
        ).to(self.device)
        lengths = torch.tensor([len(x) for x in sequences], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        given = {"attention_mask": mask.long()} if self.masked else {}
        with torch.inference_mode(), autocast(self.device, self.dtype):
            out = self.module(input_ids=ids, output_hidden_states=self.states, **given)
        means = torch.zeros(len(sequences), 0)
        if self.states:
            last = out.get("hidden_states") or out["encoder_hidden_states"]
            sums = last[-1].double().masked_fill(~mask[..., None], 0).sum(1)
            means = (sums / lengths[:, None]).float().cpu()
        return Outputs(out.logits.double().cpu() if self.classifier else None, means)
