"""torch: eager with its SDPA, in autocast, compiled, and with clinattn's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engines.batches import Batch
from engines.engine import Engine, Run

# Limit of torch.compile: more shapes than any load has.
SHAPES = 256


def load(folder: Path, kind: str, attention: str = "sdpa") -> Any:
    """transformers' model in eval mode, in the dtype of the class."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.bfloat16 if kind == "16 bit" else torch.float32
    return AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


class Torch(Engine):
    """transformers' model with torch's SDPA."""

    name = "torch"
    packages = ("torch", "transformers", "numpy")

    def open(self, folder: Path, masked: bool, threads: int) -> Run:
        import torch

        torch.set_num_threads(threads)
        model = self.model(folder)

        @torch.no_grad()
        def run(batch: Batch) -> Any:
            # Without a mask torch takes its kernel for none.
            mask = None if batch.full else torch.from_numpy(batch.mask())
            return model(torch.from_numpy(batch.ids), attention_mask=mask).last_hidden_state

        return run

    def model(self, folder: Path) -> Any:
        return load(folder, self.kind)


class TorchAutocast(Torch):
    """fp32 weights, products in bf16: norms and what is added along the layers stay fp32."""

    name = "torch autocast"

    def open(self, folder: Path, masked: bool, threads: int) -> Run:
        import torch

        run = super().open(folder, masked, threads)
        return torch.autocast("cpu", torch.bfloat16)(run)

    def model(self, folder: Path) -> Any:
        return load(folder, "fp32")


class TorchCompile(Torch):
    """torch.compile with weights frozen, a graph for each shape."""

    name = "torch.compile"

    def model(self, folder: Path) -> Any:
        import torch

        torch._dynamo.config.recompile_limit = SHAPES
        torch._dynamo.config.accumulated_recompile_limit = SHAPES
        return torch.compile(super().model(folder), dynamic=False, options={"freezing": True})


class Clinattn(Engine):
    """transformers' model after replace_attention; packed rows by transformers' own words."""

    name = "clinattn"
    packages = ("clinattn", "torch", "transformers", "numpy")
    batchings = ("padded", "packed")
    words: dict[str, Any] = {}

    def open(self, folder: Path, masked: bool, threads: int) -> Run:
        import torch

        import clinattn

        torch.set_num_threads(threads)
        model = load(folder, self.kind)
        clinattn.replace_attention(model, **self.words)

        @torch.no_grad()
        def run(batch: Batch) -> Any:
            ids = torch.from_numpy(batch.ids)
            if batch.packed:
                return model(ids, **packed_words(batch)).last_hidden_state
            mask = None if batch.full else torch.from_numpy(batch.mask())
            return model(ids, attention_mask=mask).last_hidden_state

        return run


class ClinattnLinear(Clinattn):
    """The model with attention and linear layers replaced."""

    name = "clinattn linear"
    words = {"linear": True}


def packed_words(batch: Batch) -> dict[str, Any]:
    """Positions of each sequence, and where each begins, as transformers' models take them."""
    import torch

    ends = torch.from_numpy(np.r_[0, np.cumsum(batch.lengths)].astype(np.int32))
    longest = int(batch.lengths.max())
    positions = np.concatenate([np.arange(n) for n in batch.lengths])[None]
    return {
        "position_ids": torch.from_numpy(positions),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
