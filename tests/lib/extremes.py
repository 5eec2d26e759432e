"""Scores as large as their type holds: problems, and the check that each backend is held to.

Plain maths is that of fp32, and of fp64 for fp64, whatever the type of the inputs: scores of 16
bits would choose other keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from plain import Terms, gradients, long_double, plain_scores
from support import assert_close
from torch import Tensor
from yardstick import shared

import clinattn

LN2 = math.log(2)
LOWEST = torch.finfo(torch.float32).min
# The error that an lse may have, in units of rounding at the largest of 1, |lse| and the scores.
LSE_UNITS = 4


@dataclass(frozen=True)
class Extreme:
    """n queries and keys, two heads of which share one of k and v.

    bias: added to all keys; to one of five where some is set. shape: of the mask that adds it, or
    "relative" for a table. equal: scores are small integers times the scale, many of them equal.
    first: of the first 24 keys alone, in a feature that is -1 to 1 by query; others become small.
    """

    id: str
    scale: float = 0.2
    n: int = 41
    bias: float | None = None
    shape: str = "111k"
    some: bool = False
    equal: bool = False
    first: float | None = None
    softcap: float | None = None
    causal: bool = False

    def __str__(self) -> str:
        return self.id


EXTREMES = [
    *(Extreme(f"scores-{x:.0e}", scale=x) for x in (1e3, 1e6, 1e7, 1e8, 1e9, 1e11, 1e20, 1e36)),
    Extreme("scores-negative-1e11", scale=-1e11),
    Extreme("scores-causal-1e11", scale=1e11, n=150, causal=True),
    *(Extreme(f"scores-equal-{x:.0e}", scale=x, equal=True) for x in (1e7, 1e9, 1e30)),
    *(Extreme(f"keys-{x:.0e}-{n}", bias=x, n=n) for x in (-1e30, LOWEST) for n in (5, 300)),
    *(Extreme(f"pairs-{x:.0e}", bias=x, shape="11qk") for x in (-1e9, -1e30, LOWEST, 3e38)),
    *(Extreme(f"some-{x:.0e}", bias=x, some=True) for x in (-3e38, LOWEST, 1e9, 3e38)),
    Extreme("some-pairs-3e+38", bias=3e38, shape="bhqk", some=True),
    Extreme("some-scores", scale=1e9, bias=-1e10, some=True),
    Extreme("relative-3e+38", bias=3e38, shape="relative"),
    Extreme("relative-some-3e+38", bias=3e38, shape="relative", some=True),
    *(Extreme(f"softcap-{x:.0e}", softcap=x, equal=x < 1) for x in (1e-45, 1e-39, 2.4e38, 3.4e38)),
    Extreme("softcap-scores", softcap=1e30, scale=1e31),
    # rows whose first tiles of keys have scores of another size than the rest
    Extreme("scores-of-first-keys-1e10", scale=2.0**20, first=1e4),
]


class ExtremeProblem:
    def __init__(self, case: Extreme, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        random = torch.Generator().manual_seed(0)
        draw = lambda heads: torch.randn(2, heads, case.n, 16, generator=random).to(dtype)
        self.q, self.k, self.v, self.do = draw(2), draw(1), draw(1), draw(2)
        if case.equal:
            self.q, self.k = self.q.round(), self.k.round()
        if case.first is not None:
            self.q, self.k = self.q / 1024, self.k / 1024
            self.q[..., 0] = torch.linspace(-1, 1, case.n)
            self.k[..., 0] = case.first * (torch.arange(case.n) < 24)
        self.dlse = torch.randn(2, 2, case.n, generator=random).to(self.wide)
        n, square = case.n, (2, 2, case.n, case.n)
        self.visible = torch.ones(n, n, dtype=torch.bool)
        if case.causal:
            self.visible = self.visible.tril()
        self.visible = self.visible.expand(square)
        self.terms, self.bias = Terms(softcap=case.softcap or 0.0), None
        self.keywords: dict[str, Any] = {"scale": case.scale, "softcap": case.softcap}
        self.keywords["is_causal"] = case.causal
        if case.bias is None:
            return
        info = torch.finfo(dtype if case.shape != "relative" else self.wide)
        bias = min(max(case.bias, info.min), info.max)
        if case.shape == "relative":
            table = torch.full((2, 2 * n - 1), bias, dtype=self.wide)
            if case.some:
                table[:, torch.arange(2 * n - 1) % 5 != 0] = 0
            self.keywords["relative_bias"] = table
            i = torch.arange(n)
            self.bias = table[:, i - i[:, None] + n - 1][None].expand(square)
            return
        sizes = {"b": 2, "h": 2, "q": n, "k": n, "1": 1}
        mask = torch.full([sizes[x] for x in case.shape], bias, dtype=dtype)
        if case.some:
            mask[..., torch.arange(n) % 5 != 0] = 0
        self.keywords["attn_mask"], self.bias = mask, mask.expand(square)

    def plain(
        self, dtype: torch.dtype, by_definition: bool = False, base2: bool = False
    ) -> dict[str, Tensor]:
        q, k, v, do, dlse = (x.to(dtype) for x in (self.q, self.k, self.v, self.do, self.dlse))
        bias = None if self.bias is None else self.bias.to(dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        s, slope = plain_scores(q, k, bias, self.case.scale, self.terms, {})
        s = s.masked_fill(~self.visible, -torch.inf)
        m, p = s.detach().amax(-1), s.softmax(-1)
        if base2:
            p = torch.exp2(s / LN2 - m[..., None] / LN2)
            p = p / p.sum(-1, keepdim=True)
        # not of logsumexp, whose derivative takes its result off the scores: all but the maximum is
        # lost in that
        o, lse = p @ v, m + (s - m[..., None]).exp().sum(-1).log()
        if not by_definition:
            return gradients(o, lse, do, dlse, inputs)
        with torch.no_grad():
            delta = (do * o.to(self.dtype).to(dtype)).sum(-1) - dlse
            dx = p * (do @ v.mT - delta[..., None]) * slope * self.case.scale
            of_keys = (x.sum(1, keepdim=True) for x in (dx.mT @ q, p.mT @ do))
            results = (o, lse, dx @ k, *of_keys)
            return dict(zip(("o", "lse", "dq", "dk", "dv"), results, strict=True))

    @property
    def operands(self) -> tuple:
        given = (self.q, self.k, self.v, self.do, self.dlse, self.visible, self.bias)
        return self.dtype, self.case, given, self.terms

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        return shared(self.compute_truth, self.operands)

    def compute_truth(self) -> dict[str, Tensor]:
        if self.dtype != torch.float64:
            return self.plain(torch.float64)
        inputs = (self.q, self.k, self.v, self.do, self.dlse, self.visible, self.bias)
        return long_double(*inputs, self.case.scale, self.terms)

    @cached_property
    def naive(self) -> list[dict[str, Tensor]]:
        return shared(self.compute_naive, self.operands)

    def compute_naive(self) -> list[dict[str, Tensor]]:
        results = [self.plain(self.wide), self.plain(self.wide, by_definition=True)]
        if self.dtype == torch.float64:  # taken to base 2 without a fused multiply-add
            results.append(self.plain(self.wide, base2=True))
        return results

    def run(self, backend: str) -> dict[str, Tensor]:
        inputs = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        o, lse = clinattn.fused_attention(
            *inputs, enable_gqa=True, return_lse=True, backend=backend, **self.keywords
        )
        return gradients(o, lse, self.do, self.dlse, inputs)

    def check(self, backend: str) -> None:
        actual = self.run(backend)
        for name, x in self.truth.items():
            if name in ("dq", "dk") and abs(self.case.scale) > 1e5 and self.dtype == torch.float16:
                continue  # fp16 does not hold them
            if name == "lse":
                self.check_lse(actual[name], x)
                continue
            rounded = [y[name].to(self.dtype) for y in self.naive if y[name].isfinite().all()]
            assert_close(name, actual[name], x, *rounded)

    def check_lse(self, lse: Tensor, truth: Tensor) -> None:
        """LSE_UNITS of the largest of 1, |lse| and the largest score."""
        scores = self.case.scale * self.q.double() @ self.k.double().mT
        largest = torch.maximum(scores.abs().amax(-1), truth.abs()).clamp(min=1)
        units = ((lse.double() - truth).abs() / largest).max().item() / torch.finfo(lse.dtype).eps
        assert units <= LSE_UNITS, f"lse: {units:.3g} units"
