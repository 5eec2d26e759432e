"""Functions with other libraries' names against plain maths over an explicit N x N visibility.

problem = Explicit(q, k, v, visible)    # (B, H, N, D), as drawn; what lies in padding left out
problem.check({"o": o, "lse": lse, "dq": dq, ...})
"""

from __future__ import annotations

from functools import cached_property

import torch
from plain import Terms, gradients, plain_attention, plain_backward
from support import assert_close
from torch import Tensor
from yardstick import shared

ORDERS = 3


class Explicit:
    """visible: bool, broadcasts to (B, H, Nq, Nk), as do bias, added to the scores, and distance,
    of which slopes (1 or B, H) are subtracted multiples. Both have gradients, "dbias", "dslopes".
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, bias=None, slopes=None,
        distance=None, softcap=0.0, scale=None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = (x.detach() for x in (q, k, v))
        self.full = (*q.shape[:3], k.shape[2])
        self.visible = visible.expand(self.full)
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.random = torch.Generator().manual_seed(1)
        self.do = torch.randn(*q.shape[:3], v.shape[-1], generator=self.random).to(q.dtype)
        self.dlse = torch.randn(q.shape[:3], generator=self.random)
        parameters, pieces = {}, {}
        for name, x, factor in (("bias", bias, torch.ones(())), ("slopes", slopes, distance)):
            if x is not None:
                at = torch.arange(x.numel()).view(x.shape)
                at = at if x.dim() == 4 else at[:, :, None, None]
                factor = factor if name == "bias" else -factor
                pieces[name] = (at.expand(self.full), factor.expand(self.full))
                parameters[name] = x.detach()
        self.terms = Terms(softcap=softcap, pieces=pieces, parameters=parameters)

    def evaluated(self, dtype: torch.dtype, order: list[Tensor], plainly=False) -> dict:
        """Autograd through plain maths or, plainly, the gradients as they are defined."""
        i, j, d = order
        given = (self.q[..., i, :], self.k[..., j, :], self.v[..., j, :], self.do[..., i, :])
        q, k, v, do = (x.to(dtype) for x in given)
        q, k = q[..., d], k[..., d]
        dlse, visible = self.dlse[..., i].to(dtype), self.visible[..., i, :][..., j]
        terms = self.terms.reordered(i, j)
        parameters = {name: x.to(dtype) for name, x in terms.parameters.items()}
        if not plainly:
            for x in (q, k, v, *parameters.values()):
                x.requires_grad_()
        o, lse = plain_attention(q, k, v, visible, None, self.scale, terms, parameters)
        if plainly:
            rest = (q, k, v, visible, None, self.scale, terms, parameters)
            results = {"o": o, "lse": lse, **plain_backward(do, dlse, o, lse, *rest)}
        else:
            results = gradients(o, lse, do, dlse, (q, k, v), parameters)
        i, j, d = (x.argsort() for x in order)
        rows = {"o": i, "dq": i, "dk": j, "dv": j}
        results = {
            name: x[..., rows[name], :] if name in rows else x for name, x in results.items()
        }
        results["lse"] = results["lse"][..., i]
        return results | {name: results[name][..., d] for name in ("dq", "dk")}

    def order(self, shuffled: bool) -> list[Tensor]:
        sizes = (self.q.shape[2], self.k.shape[2], self.q.shape[3])
        if shuffled:
            return [torch.randperm(n, generator=self.random) for n in sizes]
        return [torch.arange(n) for n in sizes]

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        return shared(self.compute_truth, *self.operands)

    def compute_truth(self) -> dict[str, Tensor]:
        return self.evaluated(torch.float64, self.order(shuffled=False))

    @property
    def operands(self) -> tuple:
        given = (self.q, self.k, self.v, self.do, self.dlse, self.visible)
        return *given, self.scale, self.terms

    @cached_property
    def naive(self) -> list[dict[str, Tensor]]:
        """Same-dtype maths in several orders of summation: one alone may be lucky."""
        return shared(self.compute_naive, *self.operands, self.random)

    def compute_naive(self) -> list[dict[str, Tensor]]:
        results = []
        for n in range(ORDERS):
            order = self.order(shuffled=n > 0)
            results.append(self.evaluated(self.q.dtype, order))
            if self.q.dtype == torch.float32:
                results.append(self.evaluated(self.q.dtype, order, plainly=True))
        return results

    def check(self, actual: dict[str, Tensor]) -> None:
        for name, x in actual.items():
            assert_close(name, x, self.truth[name], *(y[name] for y in self.naive))


def gradients_of(outputs: list[Tensor], cotangents: list[Tensor], **inputs: Tensor) -> dict:
    """{"dq": ..., ...} of inputs by name; lse takes its cotangent in its own dtype."""
    cotangents = [ct.to(x.dtype) for x, ct in zip(outputs, cotangents, strict=True)]
    grads = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    return {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}


def block_diagonal(blocks: list[Tensor], n_keys: int | None = None, starts=None) -> Tensor:
    """bool (rows, columns or n_keys); starts: of each block's keys, where these are not packed."""
    rows, columns = (sum(x.shape[dim] for x in blocks) for dim in (0, 1))
    visible = torch.zeros(rows, columns if n_keys is None else n_keys, dtype=torch.bool)
    row = column = 0
    for n, block in enumerate(blocks):
        column = column if starts is None else starts[n]
        visible[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return visible
