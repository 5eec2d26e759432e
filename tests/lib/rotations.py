"""Rotary cases with their truth in fp64 and a bound from rounding units; for every backend."""

import math
from dataclasses import dataclass

import torch

from clinattn import rotary

U32 = 2.0**-24


def angle_units(theta: float) -> float:
    """Rounding units in an angle: the step, the exponent (times log theta), the power (two), its
    inverse and the product, and one to spare.
    """
    return 6 + math.log(theta)


@dataclass(frozen=True)
class Rotation:
    id: str
    lengths: tuple[int, ...] = (50, 50)
    packed: bool = False
    tail: int = 0
    heads: int = 3
    kv_heads: int = 1
    dim: int = 24
    rotary_dim: int | None = None
    interleaved: bool = False
    theta: float = 10000.0
    positions: str = "index"  # index, shared, days, minutes or visits

    def __str__(self):
        return self.id


ROTATIONS = [
    Rotation("plain", dim=64),
    Rotation("one-token", lengths=(1,)),
    Rotation("odd-sizes", lengths=(113,) * 3, heads=5, kv_heads=5, dim=34),
    Rotation("dim2", dim=2),
    Rotation("dim256", dim=256, lengths=(33,)),
    Rotation("shared-positions", positions="shared", lengths=(65, 65)),
    Rotation("days", positions="days", lengths=(200, 200)),
    Rotation("minutes", positions="minutes", dim=40, theta=1e6),
    Rotation("visits", positions="visits"),
    Rotation("partial", dim=40, rotary_dim=10),
    Rotation("partial-odd-dim", dim=25, rotary_dim=24),
    Rotation("interleaved", interleaved=True, dim=40),
    Rotation("interleaved-partial", interleaved=True, dim=31, rotary_dim=18, positions="days"),
    Rotation("no-k-heads", kv_heads=0),
    Rotation("no-tokens", lengths=(0, 0)),
    Rotation("packed", packed=True, lengths=(40, 1, 0, 33), positions="days"),
    Rotation("packed-tail", packed=True, lengths=(30, 20), tail=9, positions="minutes"),
    Rotation("packed-partial", packed=True, lengths=(100,), rotary_dim=6, interleaved=True),
]


class Inputs:
    """q and k as the package gets them, positions and keywords."""

    def __init__(self, case, dtype):
        self.case, self.dtype = case, dtype
        n = sum(case.lengths) + case.tail if case.packed else case.lengths[0]
        lead = () if case.packed else (len(case.lengths),)
        shape = lambda heads: (n, heads, case.dim) if case.packed else (*lead, heads, n, case.dim)
        self.q = torch.randn(shape(case.heads)).to(dtype).requires_grad_()
        self.k = torch.randn(shape(case.kv_heads)).to(dtype).requires_grad_()
        self.dq, self.dk = (torch.randn_like(x) for x in (self.q, self.k))
        self.keywords = dict(
            theta=case.theta, rotary_dim=case.rotary_dim, interleaved=case.interleaved
        )
        self.starts = torch.zeros(n, dtype=torch.long)  # packed: the first token of a token's own
        if case.packed:
            ends = [0, *torch.tensor(case.lengths).cumsum(0).tolist()]
            for start in ends:
                self.starts[start:] = start
            self.keywords["cu_seqlens"] = torch.tensor(ends).int()
        self.positions = self.draw_positions((*lead, n))

    def draw_positions(self, shape):
        kind, n = self.case.positions, shape[-1]
        if kind == "shared":
            return torch.arange(n)
        if kind == "days":
            return torch.rand(shape).cumsum(-1) * 50 - 3000
        if kind == "minutes":
            return 5e7 + torch.rand(shape, dtype=torch.float64).cumsum(-1)
        if kind == "visits":  # seconds, in no order
            return 1_700_000_000 + torch.randint(-30_000, 30_000, shape)
        return torch.arange(n).expand(shape)

    def run(self, backend, **changed):
        """[q, k, dq, dk]"""
        keywords = {**self.keywords, "backend": backend, **changed}
        out = rotary(self.q, self.k, self.positions, **keywords)
        grads = torch.autograd.grad(out, (self.q, self.k), (self.dq, self.dk))
        return [x.detach() for x in (*out, *grads)]

    def angles(self, dtype):
        """(..., tokens, pairs) with every step rounded to dtype."""
        p = self.positions
        width = self.case.rotary_dim or self.case.dim
        origin = p[self.starts] if self.case.packed else p[..., :1]
        if not p.is_floating_point():
            origin = torch.where(origin.abs() < 2**20, 0, origin)
        pair = torch.arange(0, width, 2, dtype=dtype)
        angles = (p - origin).to(dtype)[..., None] * (1.0 / self.case.theta ** (pair / width))
        return angles.unsqueeze(1) if self.case.packed or p.dim() == 2 else angles

    def check(self, results):
        """Against fp64 truth, first for the angles as rounded to fp32, then for exact ones.

        An angle's error moves a result by (|a| + |b|) times as much. Sine, cosine and the two
        products may be off by four units of (|a| + |b|) together, and the sum is rounded to fp32
        and then to the result's type.
        """
        exact = self.angles(torch.float64)
        double = self.dtype == torch.float64
        unit = 2.0**-52 if double else U32
        for angles, slack in (
            (self.angles(torch.float64 if double else torch.float32).double(), 0.0),
            (exact, angle_units(self.case.theta) * unit * exact.abs()),
        ):
            for x, sign, actual in zip(
                (self.q, self.k, self.dq, self.dk), (1, 1, -1, -1), results, strict=True
            ):
                truth, size = self.turned(x.detach().double(), angles, sign)
                last = torch.finfo(self.dtype).eps * truth.abs() + torch.finfo(self.dtype).tiny
                bound = last + size * unit * 5 + size * self.spread(slack, size)
                assert actual.dtype == self.dtype and actual.shape == x.shape
                assert ((actual.double() - truth).abs() <= bound).all()

    def pairs(self, x):
        width = self.case.rotary_dim or self.case.dim
        if self.case.interleaved:
            return x[..., 0:width:2], x[..., 1:width:2]
        return x[..., :width].chunk(2, -1)

    def turned(self, x, angles, sign):
        """x turned in fp64, and |a| + |b| of the pair that an element belongs to (0: passed)."""
        cos, sin = angles.cos(), sign * angles.sin()
        out, size = x.clone(), torch.zeros_like(x)
        (a, b), (first, second) = self.pairs(x), self.pairs(out)
        first[...], second[...] = a * cos - b * sin, b * cos + a * sin
        for half in self.pairs(size):
            half[...] = a.abs() + b.abs()
        return out, size

    def spread(self, slack, like):
        """The slack of an angle for both members of its pair."""
        if not isinstance(slack, torch.Tensor):
            return slack
        out = torch.zeros_like(like)
        for half in self.pairs(out):
            half[...] = slack
        return out
