"""The four ways to run a batch, over one set of weights."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clinattn.encoder import MaskedLanguageModel
from clinattn.encoder.heads import IGNORE
from clinattn.operator.packing import cu_seqlens_from_lengths
from clinattn.tools.other_work import Spent, Watch
from clinattn.tools.ways import way_name
from clinattn.workloads.vocabulary import PAD

from .measure import synchronize
from .workload import MaskedExample

# Padded lengths are multiples of this number: on a GPU, SDPA copies other masks at every call.
MULTIPLE = 8


class TimeOver(Exception):
    """The deadline has passed."""


def padded_length(longest: int) -> int:
    return -(-longest // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class Variant:
    name: str
    attention: str
    packed: bool = False
    bucketed: bool = False

    @property
    def label(self) -> str:
        return way_name(self.name)

    def batches(self, lengths: list[int], batch_size: int) -> list[list[int]]:
        """Indices into lengths, batch by batch.

        Bucketed sorts all of them first, the least padding any bucketing can reach.
        """
        order = list(range(len(lengths)))
        if self.bucketed:
            order.sort(key=lengths.__getitem__)
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def computed_tokens(self, lengths: list[int], batch: list[int]) -> int:
        """Tokens that go through the model for this batch, padding included."""
        own = [lengths[i] for i in batch]
        return sum(own) if self.packed else len(own) * padded_length(max(own))

    def collate(self, rows: list[Tensor], fill: int, device: torch.device) -> Tensor:
        """(T,) if packed, else (B, N) filled up with `fill`."""
        if self.packed:
            return torch.cat(rows).to(device, non_blocking=True)
        ids = pad_sequence(rows, True, fill)
        more = padded_length(ids.shape[1]) - ids.shape[1]
        return F.pad(ids, (0, more), value=fill).to(device, non_blocking=True)

    def arrangement(self, rows: list[Tensor], device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the encoder that say how the collated rows lie."""
        lengths = torch.tensor([len(row) for row in rows])
        if self.packed:
            cu_seqlens = cu_seqlens_from_lengths(lengths).to(device)
            return {"cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}
        return {"lengths": lengths.to(device), "layout": "padded"}

    def split(self, hidden: Tensor, rows: list[Tensor]) -> list[Tensor]:
        """Hidden states of each sequence's own tokens."""
        if self.packed:
            return list(hidden.split([len(row) for row in rows]))
        return [h[: len(row)] for h, row in zip(hidden, rows, strict=True)]


VARIANTS = (
    Variant("sdpa_padded", "sdpa"),
    Variant("sdpa_bucketed", "sdpa", bucketed=True),
    Variant("clinattn_padded", "clinattn"),
    Variant("clinattn_packed", "clinattn", packed=True),
)


class Runner:
    """Runs every variant on the same model and optimizer in turn: same weights, same memory.

    until: of time.perf_counter; a batch that would begin after it raises TimeOver.
    """

    def __init__(self, model: MaskedLanguageModel, device: torch.device, until: float = math.inf):
        self.model = model
        self.device = device
        self.until = until
        # a learning rate of 0 keeps the work of a step and the weights of the start
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def use(self, variant: Variant) -> None:
        if time.perf_counter() > self.until:
            raise TimeOver
        encoder = self.model.encoder
        encoder.config = replace(encoder.config, attention=variant.attention)

    def loss(self, variant: Variant, examples: list[MaskedExample]) -> tuple[Tensor, Tensor]:
        """Mean loss over the labelled tokens of a batch, and its logits."""
        self.use(variant)
        rows = [example.masked_ids for example in examples]
        labels = variant.collate([example.labels for example in examples], IGNORE, self.device)
        ids = variant.collate(rows, PAD, self.device)
        out = self.model(ids, labels=labels, **variant.arrangement(rows, self.device))
        assert out.loss is not None
        return out.loss, out.logits

    def train(self, variant: Variant, examples: list[MaskedExample]) -> None:
        """Takes a step, from token ids to updated weights."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(variant, examples)[0].backward()
        self.optimizer.step()

    @torch.inference_mode()
    def infer(self, variant: Variant, examples: list[MaskedExample]) -> list[Tensor]:
        """Computes the hidden states of the real tokens from token ids, sequence by sequence."""
        self.use(variant)
        rows = [example.ids for example in examples]
        ids = variant.collate(rows, PAD, self.device)
        hidden = self.model.encoder(ids, **variant.arrangement(rows, self.device))
        return variant.split(hidden, rows)

    def run(self, mode: str, variant: Variant, examples: list[MaskedExample]) -> None:
        self.model.train(mode == "train")
        if mode == "train":
            self.train(variant, examples)
        else:
            self.infer(variant, examples)

    def spent(self, mode: str, variant: Variant, batches: list[list[MaskedExample]]) -> Spent:
        """The time of all batches, from the host's side of an idle device to an idle device."""
        synchronize(self.device)
        watch = Watch()
        for batch in batches:
            self.run(mode, variant, batch)
        synchronize(self.device)
        return watch.spent()

    def seconds(self, mode: str, variant: Variant, batches: list[list[MaskedExample]]) -> float:
        """Wall-clock seconds of all batches; see `spent`."""
        return self.spent(mode, variant, batches).wall

    def free(self) -> None:
        """Give up gradients, and on a GPU what the allocator holds free: room after a failure."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
