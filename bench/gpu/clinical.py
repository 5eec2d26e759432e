"""Stage of run.py that times batches of clinical lengths, packed and padded."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from clinattn import fused_attention, fused_attention_varlen
from gpu.dense_shapes import pairs_in_window
from gpu.providers import SDPA_BACKENDS, Call, Provider, bf16_inputs, compare, pinned_sdpa
from gpu.rows import Run
from gpu.training import MODEL_WIDTH

# (length profile, sequences, longest, window). SDPA's band for ehr_icu is B * N * N elements.
BATCHES = (
    ("note_discharge", 32, 8192, None),
    ("ehr_icu", 8, 8192, 128),
    ("note_chunks", 1024, 128, None),
    ("ehr_population", 64, 8192, None),
)
DRYRUN_BATCHES = (("note_discharge", 3, 9, None), ("ehr_icu", 2, 9, 4))


def clinical(run: Run) -> None:
    """Length profiles packed, against the same sequences padded behind a mask."""
    try:
        from clinattn.workloads import sample_lengths
    except ImportError as error:  # pyarrow
        run.row(skipped=f"clinical: {error}")
        return
    for profile, count, cap, window in BATCHES if not run.dryrun else DRYRUN_BATCHES:
        for dim in (64, 128) if not run.dryrun else (16,):
            if not run.enough_time(12, f"clinical from {profile} on"):
                return
            lengths = torch.as_tensor(sample_lengths(profile, count, cap))
            if run.dryrun:
                lengths -= torch.arange(count) * 4  # or there would be no padding
            heads = MODEL_WIDTH // dim if not run.dryrun else 1
            ClinicalBatch(lengths, heads, dim, window, run).measure(profile)


class ClinicalBatch:
    """The same sequences in rows of a padded batch, and one after the other."""

    def __init__(self, lengths: Tensor, heads: int, dim: int, window: int | None, run: Run) -> None:
        self.run, self.window, self.heads, self.dim = run, window, heads, dim
        self.host_lengths, self.lengths = lengths, lengths.to(run.device)
        self.longest = int(lengths.max())
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.cu_seqlens = ends.int().to(run.device)
        self.filled = torch.arange(self.longest, device=run.device) < self.lengths[:, None]
        *self.packed, self.do = bf16_inputs(run, int(ends[-1]), heads, dim)
        self.padded_qkv, self.padded_do = tuple(map(self.padded, self.packed)), self.padded(self.do)

    def padded(self, x: Tensor) -> Tensor:
        """(T, H, D) -> (B, H, N, D)"""
        out = x.new_zeros(*self.filled.shape, self.heads, self.dim)
        out[self.filled] = x
        return out.transpose(1, 2).contiguous()

    def unpadded(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[self.filled]

    def sdpa_mask(self) -> Tensor:
        """True where visible, (B, 1, 1, N), or (B, 1, N, N) with a window.

        A query that saw nothing might be NaN: one in padding sees the first key.
        """
        keys = self.filled[:, None, None]
        if self.window is None:
            return keys
        index = torch.arange(self.longest, device=self.run.device)
        band = (index[:, None] - index).abs() <= self.window
        return (keys & band) | (~self.filled[:, None, :, None] & (index == 0))

    def of_ours(self, backend: str) -> dict[str, Provider]:
        """Packed, and padded behind a mask or by lengths."""
        keywords: dict[str, Any] = {"window": self.window, "backend": backend}
        bounds = {"cu_seqlens_q": self.cu_seqlens, "max_seqlen_q": self.longest}
        keys = {"attn_mask": self.filled[:, None, None]}
        lengths = {"q_lengths": self.lengths, "kv_lengths": self.lengths}
        packed = functools.partial(fused_attention_varlen, **bounds, **keywords)
        ways = {"packed": self.packed_provider(packed, backend)}
        for name, known in (("mask", keys), ("lengths", lengths)):
            padded = functools.partial(fused_attention, **known, **keywords)
            ways[name] = self.padded_provider(padded, backend)
        return {f"clinattn-{backend}-{name}": provider for name, provider in ways.items()}

    def of_torch(self) -> dict[str, Provider]:
        providers = {}
        mask = self.sdpa_mask()
        for name, backend in SDPA_BACKENDS.items():
            if name != "sdpa-flash" or self.run.dryrun:  # on CUDA it takes no mask
                call = functools.partial(pinned_sdpa, backend, mask, False)
                providers[name] = self.padded_provider(call)
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return providers
        ends = (self.cu_seqlens, self.cu_seqlens, self.longest, self.longest)
        sides: dict[str, Any] = {}
        if self.window is not None:
            sides = {"window_size": (self.window, self.window)}
        varlen = self.packed_provider(lambda *qkv: varlen_attn(*qkv, *ends, **sides))
        return {"torch-varlen": varlen, **providers}

    def packed_provider(self, call: Call, backend: str | None = None) -> Provider:
        return Provider(call, tuple(self.packed), self.do, backend=backend)

    def padded_provider(self, call: Call, backend: str | None = None) -> Provider:
        return Provider(call, self.padded_qkv, self.padded_do, self.unpadded, backend)

    def measure(self, profile: str) -> None:
        providers: dict[str, Provider] = {}
        for backend in self.run.backends:
            providers |= self.of_ours(backend)
        providers |= self.of_torch()
        pairs = sum(pairs_in_window(n, self.window) for n in self.host_lengths.tolist())
        fields = dict(
            profile=profile,
            sequences=len(self.host_lengths),
            tokens=len(self.do),
            longest=self.longest,
            dim=self.dim,
            window=self.window,
        )
        compare(providers, 4 * self.dim * self.heads * pairs, self.run, **fields)
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()
