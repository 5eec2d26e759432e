"""Attention, forward and with gradients, against torch's SDPA on clinical shapes.

    pytest bench/bench_attention.py --benchmark-json bench/results/NAME.json
    pytest bench/bench_attention.py -k "note and forward and fp32"

Ours is checked against fp64 at the lengths it is timed on, before it is timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clinattn import fused_attention, fused_attention_varlen
from clinattn.packing import cu_seqlens_from_lengths
from clinattn.workloads import sample_lengths

CHECKED_HEADS = 2  # of the lengths that are timed: fp64 is slow
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """lengths: one for each sequence; unequal ones run packed, and padded for SDPA."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    window: int | None = None

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        total = 0
        for n in self.lengths:
            side = n - 1 if self.window is None else min(self.window, n - 1)
            total += n * (2 * side + 1) - side * (side + 1)
        return total

    def flops(self, backward: bool) -> int:
        """4D for each visible pair forward and 10D backward."""
        return self.pairs() * self.heads * self.head_dim * (14 if backward else 4)


def drawn(profile: str, count: int, max_tokens: int) -> tuple[int, ...]:
    return tuple(sample_lengths(profile, count, max_tokens).tolist())


CASES = {
    "bert_8x512": Case((512,) * 8, 12, 64),
    "chunks_32x128": Case((128,) * 32, 12, 64),
    "cehr_bert_8x512_d16": Case((512,) * 8, 8, 16),
    "timeline_4096": Case((4096,), 12, 64),
    "timeline_4096_window64": Case((4096,), 12, 64, window=64),
    "notes_packed": Case(drawn("note_discharge", 4, 4096), 12, 64),
    "population_packed": Case(drawn("ehr_population", 16, 2048), 12, 64),
}


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v as strided views (T, H, D) of one projection (T, 3, H, D), as an encoder has them."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(case.lengths), 3, case.heads, case.head_dim)
    qkv = torch.randn(shape, generator=generator).to(device, dtype)
    return list(qkv.unbind(1))


def dense(x: Tensor, case: Case) -> Tensor:
    """(T, H, D) -> (B, H, N, D), zeros in the padding."""
    return pad_sequence(list(x.split(case.lengths)), batch_first=True).transpose(1, 2)


def packed(x: Tensor, case: Case) -> Tensor:
    """The inverse of dense."""
    rows = x.transpose(1, 2)
    return torch.cat([row[:n] for row, n in zip(rows, case.lengths, strict=True)])


class Sdpa:
    """torch's SDPA on the padded batch, its mask ready-made and additive."""

    def __init__(self, case: Case, qkv: list[Tensor]):
        self.case = case
        self.inputs = [dense(x, case).contiguous().requires_grad_() for x in qkv]
        self.mask = self._mask(qkv[0].device, qkv[0].dtype)

    def _mask(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        index = torch.arange(max(self.case.lengths), device=device)
        visible = None
        if self.case.ragged:
            lengths = torch.tensor(self.case.lengths, device=device)
            visible = (index < lengths[:, None])[:, None, None, :]
        if self.case.window is not None:
            band = (index[:, None] - index).abs() <= self.case.window
            visible = band if visible is None else visible & band
        if visible is None:
            return None
        zeros = torch.zeros(visible.shape, device=device, dtype=dtype)
        return zeros.masked_fill(~visible, float("-inf"))

    def forward(self) -> Tensor:
        return F.scaled_dot_product_attention(*self.inputs, attn_mask=self.mask)

    def packed(self, x: Tensor) -> Tensor:
        return packed(x, self.case)


class Ours:
    """fused_attention where all lengths are equal, fused_attention_varlen where they are not."""

    def __init__(self, case: Case, qkv: list[Tensor]):
        self.case = case
        lengths = torch.tensor(case.lengths, device=qkv[0].device)
        self.cu_seqlens = cu_seqlens_from_lengths(lengths)
        if case.ragged:
            self.inputs = [x.detach().requires_grad_() for x in qkv]
        else:
            self.inputs = [dense(x, case).requires_grad_() for x in qkv]

    def forward(self) -> Tensor:
        if not self.case.ragged:
            return fused_attention(*self.inputs, window=self.case.window)  # type: ignore[return-value]
        longest = max(self.case.lengths)
        return fused_attention_varlen(  # type: ignore[return-value]
            *self.inputs, self.cu_seqlens, None, longest, longest, window=self.case.window
        )

    def packed(self, x: Tensor) -> Tensor:
        return x if self.case.ragged else packed(x, self.case)


def results(way: Sdpa | Ours, d_out: Tensor) -> dict[str, Tensor]:
    """o, dq, dk, dv at the real tokens; d_out (T, H, D)."""
    o = way.forward()
    (way.packed(o) * d_out).sum().backward()
    grads = {f"d{name}": way.packed(x.grad) for name, x in zip("qkv", way.inputs, strict=True)}
    for x in way.inputs:
        x.grad = None
    return {"o": way.packed(o.detach())} | grads


def check(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Ours within twice the error of SDPA in the same dtype plus two rounding units, by fp64."""
    case = replace(case, heads=CHECKED_HEADS)
    qkv = inputs(case, dtype, device)
    d_out = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(qkv[0])
    truth = results(Sdpa(case, [x.double() for x in qkv]), d_out.double())
    naive, ours = results(Sdpa(case, qkv), d_out), results(Ours(case, qkv), d_out)
    unit = torch.finfo(dtype).eps
    for name, expected in truth.items():
        allowed = 2 * (naive[name].double() - expected).abs().max()
        allowed += 2 * unit * expected.abs().max()
        assert (ours[name].double() - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def test_attention(race, device, name, passes, dtype):
    case = CASES[name]
    qkv = inputs(case, DTYPES[dtype], device)
    check(case, DTYPES[dtype], device)
    sdpa, ours = Sdpa(case, qkv), Ours(case, qkv)
    backward = passes == "forward_backward"

    def work(way: Sdpa | Ours):
        d_out = torch.randn_like(way.forward())

        def step() -> None:
            if backward:
                way.forward().backward(d_out)
                for x in way.inputs:
                    x.grad = None
            else:
                with torch.no_grad():
                    way.forward()

        return step

    race(
        work(ours),
        {"sdpa": work(sdpa)},
        tokens=sum(case.lengths),
        flops=case.flops(backward),
        dtype=DTYPES[dtype],
        case=name,
        passes=passes,
        sequences=len(case.lengths),
        longest=max(case.lengths),
        heads=case.heads,
        head_dim=case.head_dim,
        window=case.window,
    )
