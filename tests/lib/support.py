"""Truth and tolerance for a Case: fp64 results, and the errors of plain maths in its dtype.

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
from drawn import PARAMETERS, Drawn
from plain import gradients, long_double, plain_attention, plain_backward
from torch import Tensor
from yardstick import shared

import clinattn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The backends that serve CPU tensors here. The compiled backend is tested wherever it is built.
BACKENDS = [name for name in ("reference", "cpu") if clinattn.backends()[name]]
# The backends that give the same bits in any batch, packing and number of threads.
KERNELS = [name for name in BACKENDS if name != "reference"]

# `clinattn.backends` is the function; this is the module.
backends_module = importlib.import_module("clinattn.backends.select")


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


class Problem(Drawn):
    """A Case with numbers, its true results, and those of plain maths.

    orders: in how many orders of summation plain maths is evaluated.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
        orders: int = 3,
    ) -> None:
        super().__init__(case, dtype, device, seed)
        self.orders = orders

    @cached_property
    def clean(self) -> list[Tensor]:
        """q, k, v, do and dlse without NaN, (1, H, T, D) in the packed layout."""
        k, v = self.k, self.v
        if self.case.strides == "expanded":
            k, v = (x[:, :1].expand(x.shape) for x in (k, v))
        do = (
            self.v.new_zeros((*self.q.shape[:-1], self.v.shape[-1])) if self.do is None else self.do
        )
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
        blocks = Blocks(*(x[0].to(self.q.device) for x in (layout.owner_q, layout.owner_k)))
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
        return shared(self.compute_truth, self.dtype, self.case, self.scale, self.operands)

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
        """Returns everything that results in several orders of summation depend on."""
        return self.dtype, self.case, self.scale, self.operands, self.orders, self.random

    def orders_of_summation(self) -> Iterator[list[Tensor]]:
        """Places of queries, keys and features of q and of v: as they are first, then at random."""
        q, k, v, *_ = self.operands
        sizes = [q.shape[2], k.shape[2], q.shape[3]]
        if self.case.value_dim is not None:
            sizes.append(v.shape[3])
        for order in range(self.orders):
            places = [torch.arange(n) for n in sizes]
            if order > 0:
                places = [torch.randperm(len(x), generator=self.random) for x in places]
            yield [*places[:3], places[-1]]

    def reordered(self, i: Tensor, j: Tensor, d: Tensor, e: Tensor) -> list[Tensor | None]:
        """The same problem with its queries, keys and features in another order."""
        q, k, v, do, dlse, visible, bias, terms = self.operands
        bias = None if bias is None else bias[..., i, :][..., j]
        of_rows = ((q, i, d), (k, j, d), (v, j, e), (do, i, e))
        tensors = [x[..., rows, :][..., features] for x, rows, features in of_rows]
        terms = terms.reordered(i, j)
        return [*tensors, dlse[..., i], visible[..., i, :][..., j], bias, terms]

    def restored(self, results: dict[str, Tensor], *places: Tensor) -> dict[str, Tensor]:
        """Results of a reordered problem, in the order of this one."""
        i, j, d, e = (x.argsort() for x in places)
        restored = {}
        for name, x in results.items():
            if name[1:] in PARAMETERS:
                restored[name] = x
                continue
            rows = j if name in ("dk", "dv") else i
            features = e if name in ("o", "dv") else d
            x = x[..., rows] if name == "lse" else x[..., rows, :][..., features]
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
