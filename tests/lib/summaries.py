"""Truth and tolerance for summaries of a Case: the whole N x N matrix of weights in numpy.

problem = SummaryProblem(case, dtype)
problem.check("relevance", problem.summary("relevance", backend))
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import Case
from drawn import Drawn
from features import SEED
from support import max_error, rounding_unit
from torch import Tensor
from yardstick import shared

import clinattn

TOP = 5
SUMS = ("received", "norm", "gradient", "relevance")
BY_QUERY = ("entropy", "max", "topk")
REDUCTIONS = (*SUMS, *BY_QUERY)


ORDERS = 3  # of summation, in which plain maths is evaluated


class Pairs(NamedTuple):
    p: np.ndarray  # (B, H, Nq, Nk)
    dp: np.ndarray
    norms: np.ndarray  # (B, H, Nk), of values
    largest: float  # of 1, |lse| and the scores


def weights_of_pairs(drawn: Drawn, kind: Any, order: int = 0, by_lse: bool = False) -> Pairs:
    """Returns plain maths in the numpy type `kind`, with features summed in an order of many.

    by_lse: the weights are exp(s - lse), with lse rounded to that type.
    """
    wide = lambda x: x.detach().double().cpu().numpy().astype(kind)
    groups = drawn.heads // drawn.kv_heads
    q, k, v, do = map(wide, (drawn.q, drawn.k, drawn.v, drawn.do))
    random = np.random.default_rng(order)
    if order:
        at = random.permutation(q.shape[-1])
        q, k = q[..., at], k[..., at]
        at = random.permutation(v.shape[-1])
        v, do = v[..., at], do[..., at]
    if drawn.case.strides == "expanded":
        k, v = (np.broadcast_to(x[:, :1], x.shape) for x in (k, v))
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    terms, visible = drawn.terms, drawn.visible.cpu().numpy()
    s = kind(drawn.scale) * (q @ k.swapaxes(-1, -2))
    if terms.softcap:
        s = kind(terms.softcap) * np.tanh(s / kind(terms.softcap))
    if drawn.bias is not None:
        s = s + wide(drawn.bias)
    for name, (at, by) in terms.pieces.items():
        s = s + wide(terms.parameters[name]).ravel()[at.cpu().numpy()] * wide(by)
    visible = np.broadcast_to(visible, s.shape)
    top = s.max(-1, keepdims=True, initial=-np.inf, where=visible)
    top = np.where(np.isinf(top), 0, top)
    p = np.where(visible, np.exp(np.minimum(s - top, 0)), 0)
    total = p.sum(-1, keepdims=True)
    total[total == 0] = 1
    p = p / total
    lse = top + np.log(total)
    if by_lse:
        p = np.where(visible, np.exp(np.minimum(s - lse, 0)), 0)
    largest = np.abs(s).max(initial=1, where=visible), np.abs(lse).max(initial=1)
    return Pairs(p, do @ v.swapaxes(-1, -2), np.sqrt((v * v).sum(-1)), float(max(largest)))


class SummaryProblem(Drawn):
    """A Case with numbers, weights of its queries, and what all reductions make of them.

    Queries of weight 0 hold NaN, as does their do.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        super().__init__(case, dtype, device, seed)
        if self.do is None:
            self.do = torch.randn(
                (*self.q.shape[:-1], self.v.shape[-1]), generator=self.random
            ).to(device, dtype)
        shape = (self.batch, self.heads, self.nq)
        weights = torch.randn(shape, generator=self.random)
        weights[torch.rand(shape, generator=self.random) < 0.2] = 0
        self.weights = weights.to(self.lse_like)

    def summary(self, reduce: str, backend: str | None, lse: Tensor | None = None) -> Any:
        """Returns the result of the package; sums over queries by the weights."""
        tensors, keywords = self.summary_arguments(reduce)
        return clinattn.attention_summary(*tensors, lse=lse, backend=backend, **keywords)

    def summary_arguments(self, reduce: str) -> tuple[list[Tensor], dict[str, Any]]:
        """Returns (query, key, value, do) and the other arguments."""
        (q, k, v), keywords = self.arguments
        do = torch.where(self.alive_q[..., None], self.do, torch.nan)
        weights = None
        if reduce in SUMS:
            unread = self.weights == 0
            do = torch.where(unread[..., None], torch.nan, do)
            q = torch.where(self.given(unread[..., None]), torch.nan, q)
            weights = self.weights[0] if self.case.packed else self.weights
        keywords = {
            name: x for name, x in keywords.items() if name not in ("dropout_p", "return_lse")
        }
        keywords |= {"weights": weights, "reduce": reduce, "k": TOP}
        return [q, k, v, self.given(do)], keywords

    def forward_lse(self, backend: str | None) -> Tensor:
        inputs, keywords = self.arguments
        call = clinattn.fused_attention_varlen if self.case.packed else clinattn.fused_attention
        torch.manual_seed(SEED)
        return call(*inputs, **{**keywords, "backend": backend, "return_lse": True})[1].detach()

    def dense(self, kind: Any, *way: Any) -> dict[str, Tensor]:
        """Returns every reduction by plain maths in the numpy type `kind`, as fp64 tensors."""
        p, dp, norms, _ = weights_of_pairs(self, kind, *way)
        w = self.weights.cpu().numpy().astype(kind)[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = np.where(p > 0, -p * np.log(p), 0).sum(-1)
        results = {
            "received": (w * p).sum(-2),
            "norm": (w * p).sum(-2) * norms,
            "gradient": (w * p * dp).sum(-2),
            "relevance": (w * np.maximum(p * dp, 0)).sum(-2),
            "entropy": entropy,
            "max": p.max(-1, initial=0),
            "topk": -np.sort(-p, -1)[..., :TOP],
            "p": p,
        }
        return {name: torch.from_numpy(x.astype(np.float64)) for name, x in results.items()}

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        return shared(self.compute_truth, *self.operands)

    def compute_truth(self) -> dict[str, Tensor]:
        return self.dense(np.longdouble)

    @cached_property
    def naive(self) -> list[dict[str, Tensor]]:
        return shared(self.compute_naive, *self.operands)

    @property
    def operands(self) -> tuple[Any, ...]:
        """Returns everything that the results of plain maths depend on."""
        tensors = self.q, self.k, self.v, self.do, self.weights, self.visible, self.bias
        return self.dtype, self.case, self.scale, tensors, self.terms

    def compute_naive(self) -> list[dict[str, Tensor]]:
        kind = np.float64 if self.dtype == torch.float64 else np.float32
        return [
            self.dense(kind, order, by_lse) for order in range(ORDERS) for by_lse in (False, True)
        ]

    def check(self, reduce: str, actual: Any, lse_units: int = 0) -> None:
        """lse_units: of rounding at Pairs.largest, by which the lse in use may differ: each weight
        then differs by as much of itself.
        """
        places = None
        if reduce == "topk":
            actual, places = actual
            places = places.cpu()
        actual = self._dense_form(actual.cpu())
        truth, naive = self.truth[reduce], [x[reduce] for x in self.naive]
        if reduce == "topk":
            fewer = TOP - truth.shape[-1]  # keys
            truth, *naive = (
                torch.nn.functional.pad(x, (0, max(fewer, 0))) for x in (truth, *naive)
            )
        of_itself = lse_units * torch.finfo(self.lse_like.dtype).eps
        if lse_units:
            of_itself *= weights_of_pairs(self, np.float64).largest
        check_close(reduce, actual, truth, naive, self.size_of_terms(reduce), of_itself)
        if places is not None:
            self.check_places(self._dense_form(places), actual, of_itself)

    def size_of_terms(self, reduce: str) -> Tensor:
        """Returns what results are rounded at: where terms cancel, the sum of their magnitudes."""
        if reduce == "entropy":  # an error of a weight of 1 counts as much
            return self.truth[reduce].clamp(min=1)
        if reduce not in SUMS:
            return self.truth[reduce]
        p, dp, norms = (torch.from_numpy(x) for x in weights_of_pairs(self, np.float64)[:3])
        size = self.weights.cpu().double().abs()[..., None] * p
        if reduce in ("gradient", "relevance"):
            # dp itself is a sum, of products as large as |do| |v|
            size = size * dp.abs().clamp(min=float(dp.abs().amax()) if dp.numel() else 0)
        size = size.sum(-2)
        return size * norms if reduce == "norm" else size

    def check_places(self, places: Tensor, values: Tensor, of_itself: float) -> None:
        """The weights at these places are the values, no place comes twice, and -1 is for 0."""
        assert places.dtype == torch.int64
        assert torch.equal(places == -1, values == 0)
        within = places + (self._starts() if self.case.packed else 0)
        p = self.truth["p"]
        if p.shape[-1] == 0:
            return
        at = p.gather(-1, within.clamp(0, p.shape[-1] - 1))
        there = places >= 0
        unit = 2 * rounding_unit(p, values.dtype) + 2 * max(
            max_error(x["p"], p) for x in self.naive
        )
        assert ((at - values).abs() <= unit + of_itself * at)[there].all()
        ordered = within.masked_fill(~there, -1).sort(-1).values
        assert ((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] < 0)).all()

    def _starts(self) -> Tensor:
        """Returns the first row of the keys of each packed query's sequence (1, 1, T, 1)."""
        cu_q = torch.tensor([0, *self.lengths_q]).cumsum(0)
        cu_k = torch.tensor([0, *self.lengths_k]).cumsum(0)
        owner = torch.bucketize(torch.arange(self.nq), cu_q[1:], right=True)
        return cu_k[owner.clamp(max=len(cu_k) - 1)][None, None, :, None]

    def _dense_form(self, x: Tensor) -> Tensor:
        return x[None] if self.case.packed else x


def check_close(
    name: str,
    actual: Tensor,
    truth: Tensor,
    naive: list[Tensor],
    size: Tensor,
    of_itself: float,
) -> None:
    """Asserts as support.assert_close does, but with two rounding units at `size`, and with that
    part of it which weights differ by. (The entropy h differs by no more than 1 + h times that.)
    """
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} values are not finite"
    error = max_error(actual, truth)
    bound = 2 * max(max_error(x, truth) for x in naive) + 2 * rounding_unit(size, actual.dtype)
    if size.numel():
        bound += 2 * of_itself * size.max().item()
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
