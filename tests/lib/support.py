"""Inputs, truth and tolerance for a Case; used by every test that compares numbers.

problem = Problem(case, dtype)                 # inputs drawn in dtype, NaN in the padding
actual = problem.run(backend)                  # {"o", "lse", "dq", "dk", "dv"}
problem.check(actual)                          # against fp64 truth, see assert_close
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from functools import cached_property, partial

import torch
from blocks import Blocks
from cases import Case
from features import SEED, Features, make_layout
from plain import gradients, long_double, plain_attention, plain_backward
from torch import Tensor
from yardstick import shared

import clinattn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Those that serve CPU tensors here. The compiled backend is tested wherever it is built.
BACKENDS = [name for name in ("reference", "cpu") if clinattn.backends()[name]]
# Those that promise the same bits in any batch, packing and number of threads.
KERNELS = [name for name in BACKENDS if name != "reference"]

# Inputs with gradients besides q, k and v, and their keywords.
PARAMETERS = {
    "mask": "attn_mask",
    "decay": "time_decay",
    "slopes": "alibi_slopes",
    "relative": "relative_bias",
}

# `clinattn.backends` is the function; this is the module.
backends_module = importlib.import_module("clinattn.backends")


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounding_unit(truth: Tensor, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at the largest result: sums that reach it are rounded at its scale."""
    largest = truth.abs().max().item() if truth.numel() else 0.0
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(largest, info.tiny)))


def max_error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_close(name: str, actual: Tensor, truth: Tensor, *naive: Tensor) -> None:
    """Error at most twice that of plain same-dtype maths, plus two rounding units.

    Several naive results are several ways to write the plain maths; the worst of them counts.
    """
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    known = truth.isfinite()
    assert torch.equal(actual[~known].double(), truth[~known]), f"{name}: differs where infinite"
    actual, truth = actual[known], truth[known]
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} values are not finite"
    error = max_error(actual, truth)
    plain_error = max(max_error(x[known], truth) for x in naive)
    bound = 2 * plain_error + 2 * rounding_unit(truth, actual.dtype)
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


class Problem:
    """A Case with numbers: q k v do dlse as the package gets them, and the same without NaN.

    Dense tensors are (B, H, N, D). Packed ones are seen by plain_attention as one long sequence,
    (1, H, T, D), whose visibility is block diagonal. orders: in how many orders of summation plain
    maths is evaluated.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
        orders: int = 3,
    ) -> None:
        self.case, self.dtype, self.device, self.orders = case, dtype, device, orders
        self.random = torch.Generator().manual_seed(seed)
        nq, nk = case.nq, case.nq if case.nk is None else case.nk
        self.lengths_q, self.lengths_k = nq, nk
        self.batch = 1 if case.packed else case.batch
        self.nq = sum(nq) + case.tail if isinstance(nq, tuple) else nq
        self.nk = sum(nk) + case.tail if isinstance(nk, tuple) else nk
        self.heads, self.kv_heads = case.heads, case.kv_heads or case.heads
        self.scale = case.dim**-0.5 if case.scale is None else case.scale
        self.mask = self.make_mask()
        self.bias = None
        if self.mask is not None and self.mask.dtype != torch.bool:
            self.bias = torch.where(self.mask == -float("inf"), 0, self.mask)
        layout = make_layout(case, self.first_keys())
        self.features = Features(case, layout, self.heads, dtype, self.random, device)
        self.visible = self.make_visible()  # (batch, heads or 1, nq, nk)
        leaf = None
        if case.mask_grad:
            leaf, self.bias = torch.where(self.leaf == -float("inf"), 0, self.leaf), None
        self.terms = self.features.terms(leaf).to(device)
        self.q = self.draw(self.heads, self.nq)
        self.k, self.v = (self.draw(self.kv_heads, self.nk) for _ in range(2))
        if case.rising:  # five plateaus
            height = torch.linspace(0, 4.99, self.nk).floor()[:, None]
            self.q = self.q.abs()
            self.k = (self.k / 8 + height.to(self.k)).to(dtype)
        if case.logits is not None and self.nq and self.nk:
            groups = self.heads // self.kv_heads
            s = self.scale * self.q.double() @ self.k.double().repeat_interleave(groups, 1).mT
            self.q = (self.q * (case.logits / s.abs().max())).to(dtype)
        self.make_cotangents()

    def draw(self, heads: int, tokens: int) -> Tensor:
        x = torch.randn(self.batch, heads, tokens, self.case.dim, generator=self.random)
        return x.to(self.device, self.dtype)

    def make_mask(self) -> Tensor | None:
        if self.case.mask is None:
            return None
        kind, letters = self.case.mask.split(":")
        full = {"b": self.batch, "h": self.heads, "q": self.nq, "k": self.nk, "1": 1}
        shape = [full[letter] for letter in letters]
        draw = torch.rand(shape, generator=self.random)
        if kind in ("left", "right"):  # the sequences lose 0, 1/3, 2/3, ... of their keys
            lost = torch.arange(shape[0]) * self.nk // max(shape[0], 1)
            ahead = torch.arange(self.nk)
            kept = ahead >= lost[:, None] if kind == "left" else ahead < self.nk - lost[:, None]
            mask = kept[:, None, None]
        elif kind == "none":
            mask = torch.zeros(shape, dtype=torch.bool)
        elif kind == "bool":
            mask = draw < 0.7
        else:
            mask = torch.randn(shape, generator=self.random).masked_fill(draw > 0.8, -float("inf"))
            mask = mask.to(self.dtype)
        if self.case.mask_grad:
            self.leaf = mask.to(self.device)
        if self.case.expand_mask:
            mask = mask.expand(self.batch, self.heads, self.nq, self.nk)
        return mask.to(self.device)

    @property
    def allowed(self) -> Tensor:
        """What the mask lets through, 4-D."""
        allowed = self.mask if self.mask.dtype == torch.bool else self.mask != -float("inf")
        return allowed[(None,) * (4 - allowed.dim())].cpu()

    def first_keys(self) -> Tensor:
        """(batch,): where the valid keys begin, as a mask of the keys alone says."""
        none = torch.zeros(self.batch, dtype=torch.long)
        if self.mask is None or any(x in self.case.mask.split(":")[1][:-1] for x in "hq"):
            return none
        allowed = self.allowed[:, 0, 0].expand(self.batch, self.nk)
        return torch.where(allowed.any(-1), allowed.int().argmax(-1), 0) if self.nk else none

    def make_visible(self) -> Tensor:
        case, at = self.case, self.features.layout
        ahead = (at.at_k[:, None] - at.at_q[..., None])[:, None]
        left, right = case.window if isinstance(case.window, tuple) else (case.window, case.window)
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if case.causal:
            visible &= ahead <= 0
        if left is not None:
            visible &= ahead >= -left
        if right is not None:
            visible &= ahead <= right
        visible = self.features.visible(visible)
        if self.mask is not None:
            visible = visible & self.allowed
        return visible.to(self.device)

    def make_cotangents(self) -> None:
        shape, kind = self.q.shape, self.case.cotangent
        self.do = torch.randn(shape, generator=self.random).to(self.device, self.dtype)
        lse_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.lse_like = torch.empty(shape[:-1], dtype=lse_dtype, device=self.device)
        self.dlse = torch.randn(shape[:-1], generator=self.random).to(self.lse_like)
        if kind == "expanded":
            self.do = torch.full((), 0.5, dtype=self.dtype, device=self.device).expand(shape)
            self.dlse = self.lse_like.new_full((), -0.5).expand(shape[:-1])
        if kind == "o":
            self.dlse = None
        if kind == "lse":
            self.do = None

    # What the package sees

    @cached_property
    def arguments(self) -> tuple[list[Tensor], dict]:
        """(query, key, value) in the strides of the case, NaN in their padding, and keywords."""
        case = self.case
        q, k, v = (self.to_strides(x) for x in (self.q, self.k, self.v))
        self.poison(q, k, v)
        keywords = {
            "is_causal": case.causal,
            "window": case.window,
            "scale": case.scale,
            "enable_gqa": self.heads != self.kv_heads,
            "return_lse": True,
        }
        if case.packed:
            cu_seqlens = [
                torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
                for lengths in (self.lengths_q, self.lengths_k)
            ]
            names = ("cu_seqlens_q", "cu_seqlens_k")
            keywords |= dict(zip(names, cu_seqlens, strict=True))
        else:
            keywords["attn_mask"] = self.mask
            for name in ("q_lengths", "kv_lengths"):
                lengths = getattr(case, name)
                if lengths is not None:
                    keywords[name] = torch.tensor(lengths, device=self.device)
        for name, x in self.features.keywords.items():
            keywords[name] = x.to(self.device) if isinstance(x, Tensor) else x
        self.leaves = {}
        for name in self.terms.parameters:
            given = self.leaf if name == "mask" else keywords[PARAMETERS[name]]
            leaf = given.detach().clone().requires_grad_()
            self.leaves[name] = keywords[PARAMETERS[name]] = leaf
        if case.mask_grad and case.expand_mask:
            keywords["attn_mask"] = self.leaves["mask"].expand(self.mask.shape)
        return [self.given(x).detach().requires_grad_() for x in (q, k, v)], keywords

    def given(self, x: Tensor) -> Tensor:
        """(1, H, T, D) -> (T, H, D) in the packed layout."""
        return x[0].transpose(0, 1) if self.case.packed else x

    def to_strides(self, x: Tensor) -> Tensor:
        """The same values in the strides of the case, always in memory of their own."""
        kind = self.case.strides
        # "transposed" is (B, N, H, D) or (H, T, D) in memory: not the layout the package is given.
        if (kind == "transposed") != self.case.packed:
            return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        if kind == "sliced":
            return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]
        if kind == "reversed":
            return x.mT.clone(memory_format=torch.contiguous_format).mT
        if kind == "expanded" and x is not self.q:
            return x[:, :1].clone().expand(x.shape)
        return x.clone()

    def poison(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """NaN into queries that see nothing and keys that nothing sees."""
        if self.case.strides == "expanded":
            return
        q[~self.alive_q] = math.nan
        k[~self.alive_k] = math.nan
        v[~self.alive_k] = math.inf

    @cached_property
    def alive_q(self) -> Tensor:
        return self.visible.any(-1).expand(self.batch, self.heads, self.nq)

    @cached_property
    def alive_k(self) -> Tensor:
        seen = self.visible.any(-2).expand(self.batch, self.heads, self.nk)
        return seen.unflatten(1, (self.kv_heads, -1)).any(2)

    def cotangents(self) -> tuple[Tensor | None, Tensor | None]:
        """(do, dlse) as the package gets them; NaN where they belong to padding."""
        do, dlse = self.do, self.dlse
        if self.case.cotangent != "expanded":
            dead = ~self.alive_q
            do = do if do is None else torch.where(dead[..., None], math.nan, do)
            dlse = dlse if dlse is None else torch.where(dead, math.inf, dlse)
        if self.case.packed:
            do = do if do is None else do[0].transpose(0, 1)
            dlse = dlse if dlse is None else dlse[0]
        return do, dlse

    def run(self, backend: str | None = None, **changed) -> dict[str, Tensor]:
        inputs, keywords = self.arguments
        call = clinattn.fused_attention_varlen if self.case.packed else clinattn.fused_attention
        torch.manual_seed(SEED)
        o, lse = call(*inputs, **{**keywords, "backend": backend, **changed})
        return gradients(o, lse, *self.cotangents(), inputs, self.leaves)

    # What it should give

    @cached_property
    def clean(self) -> list[Tensor]:
        """q, k, v, do and dlse without NaN, (1, H, T, D) in the packed layout."""
        k, v = self.k, self.v
        if self.case.strides == "expanded":
            k, v = (x[:, :1].expand(x.shape) for x in (k, v))
        do = torch.zeros_like(self.q) if self.do is None else self.do
        dlse = torch.zeros_like(self.lse_like) if self.dlse is None else self.dlse
        return [self.q, k, v, do, dlse.masked_fill(~self.alive_q, 0)]

    def plain(self, dtype: torch.dtype, attention=plain_attention) -> dict[str, Tensor]:
        """Plain maths in a dtype, differentiated by autograd."""
        return self.all_given(self.by_autograd(self.operands, dtype, attention))

    @cached_property
    def operands(self) -> list:
        """q, k, v, do, dlse, visible, bias and terms for plain maths.

        Packed sequences are the rows of a batch where that is less work than one long sequence.
        """
        full = (self.batch, self.heads, self.nq, self.nk)
        visible = self.visible.expand(full)
        bias = None if self.bias is None else self.bias.expand(full)
        if self.blocks is None:
            return [*self.clean, visible, bias, self.terms]
        q, k, v, do, dlse = self.clean
        of_queries, of_keys = self.blocks.rows, partial(self.blocks.rows, of_keys=True)
        tensors = [of_queries(q), of_keys(k), of_keys(v), of_queries(do)]
        tensors += [of_queries(dlse[..., None])[..., 0], self.blocks.pairs(visible)]
        bias = None if bias is None else self.blocks.pairs(bias)
        return [*tensors, bias, self.blocks.terms(self.terms)]

    @cached_property
    def blocks(self) -> Blocks | None:
        if not self.case.packed or not (self.nq and self.nk):
            return None
        layout = self.features.layout
        blocks = Blocks(layout.owner_q[0], layout.owner_k[0])
        return blocks if blocks.is_smaller else None

    def by_autograd(self, operands, dtype, attention=plain_attention) -> dict[str, Tensor]:
        *clean, visible, bias, terms = operands
        *inputs, do, dlse = (x.detach().to(dtype) for x in clean)
        q, k, v = (x.requires_grad_() for x in inputs)
        if terms.is_plain:
            o, lse = attention(q, k, v, visible, bias, self.scale)
            return gradients(o, lse, do, dlse, (q, k, v))
        parameters = {
            name: x.detach().to(dtype).requires_grad_() for name, x in terms.parameters.items()
        }
        o, lse = attention(q, k, v, visible, bias, self.scale, terms, parameters)
        return gradients(o, lse, do, dlse, (q, k, v), parameters)

    def by_definition(self, operands) -> dict[str, Tensor]:
        """plain_backward in the dtype at hand."""
        (q, k, v, do, dlse), (visible, bias, terms) = operands[:5], operands[5:]
        rest = (visible, bias, self.scale, terms, terms.parameters)
        o, lse = plain_attention(q, k, v, *rest)
        return plain_backward(do, dlse, o, lse, q, k, v, *rest)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        return shared(self.compute_truth, self.dtype, self.case, self.operands)

    def compute_truth(self) -> dict[str, Tensor]:
        if self.dtype != torch.float64:
            return self.plain(torch.float64)
        *operands, terms = self.operands
        return self.all_given(long_double(*operands, self.scale, terms))

    @cached_property
    def naive(self) -> list[dict[str, Tensor]]:
        """Plain same-dtype maths, in several orders of summation: one alone may be lucky.

        By autograd, and in fp32 and fp64 also from (o, lse), as torch's own kernels do it: with a
        single key autograd's ds is exactly 0. Gradients in 16 bits, summed in fp32, need no more
        than autograd in 16 bits.
        """
        return shared(self.compute_naive, *self.in_its_orders())

    def compute_naive(self) -> list[dict[str, Tensor]]:
        results = []
        for places in self.orders_of_summation():
            operands = self.reordered(*places)
            evaluated = [self.by_autograd(operands, self.dtype)]
            if self.dtype == self.lse_like.dtype:
                evaluated.append(self.by_definition(operands))
            results += [self.restored(x, *places) for x in evaluated]
        return results

    def by_torch(self, attention) -> list[dict[str, Tensor]]:
        """Attention of torch's own in the dtype of the problem, in several orders as naive is."""

        def by_torch() -> list[dict[str, Tensor]]:
            return [
                self.restored(self.by_autograd(self.reordered(*x), self.dtype, attention), *x)
                for x in self.orders_of_summation()
            ]

        return shared(by_torch, attention.__qualname__, *self.in_its_orders())

    def in_its_orders(self) -> tuple:
        """What results in several orders of summation depend on."""
        return self.dtype, self.case, self.operands, self.orders, self.random

    def orders_of_summation(self) -> Iterator[list[Tensor]]:
        """Places of queries, keys and features: as they are first, then at random."""
        q, k, *_ = self.operands
        for order in range(self.orders):
            places = [torch.arange(n) for n in (q.shape[2], k.shape[2], self.case.dim)]
            if order > 0:
                places = [torch.randperm(len(x), generator=self.random) for x in places]
            yield places

    def reordered(self, i: Tensor, j: Tensor, d: Tensor) -> list[Tensor | None]:
        """The same problem with its queries, keys and features in another order."""
        q, k, v, do, dlse, visible, bias, terms = self.operands
        bias = None if bias is None else bias[..., i, :][..., j]
        tensors = [x[..., rows, :][..., d] for x, rows in ((q, i), (k, j), (v, j), (do, i))]
        terms = terms.reordered(i, j)
        return [*tensors, dlse[..., i], visible[..., i, :][..., j], bias, terms]

    def restored(self, results: dict[str, Tensor], i: Tensor, j: Tensor, d: Tensor) -> dict:
        """Results of a reordered problem, in the order of this one."""
        i, j, d = i.argsort(), j.argsort(), d.argsort()
        restored = {}
        for name, x in results.items():
            if name[1:] in PARAMETERS:
                restored[name] = x
                continue
            rows = j if name in ("dk", "dv") else i
            x = x[..., rows] if name == "lse" else x[..., rows, :][..., d]
            restored[name] = x
        return self.all_given(restored)

    def all_given(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.case.packed:
            return results
        if self.blocks is not None:
            results = self.blocks.joined(results)
        seen = {name: x for name, x in results.items() if name[1:] in PARAMETERS}
        return seen | {
            name: x[0] if name == "lse" else self.given(x)
            for name, x in results.items()
            if name not in seen
        }

    def check(self, actual: dict[str, Tensor]) -> None:
        for name, truth in self.truth.items():
            assert_close(name, actual[name], truth, *(x[name] for x in self.naive if name in x))
