"""Calls of attention over a sequence split over processes, and the same in one process.

A module of its own, because the processes of tests/parallel/processes import it by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clinattn import context_parallel, fused_attention, fused_attention_varlen
from clinattn.parallel import gather, shard


@dataclass(frozen=True)
class SplitCase:
    """ends: cu_seqlens of a packed call; None for a dense one of `rows` rows of `tokens`.

    sizes: tokens of each process, None for nearly equal ones. words: of the call.
    """

    words: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] | None = None
    rows: int = 1
    tokens: int = 611
    lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    timed: bool = False
    dtype: torch.dtype = torch.float32
    gathered: bool = False
    sizes: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)

    @property
    def token_dim(self) -> int:
        return 2 if self.ends is None else 0

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v, and the cotangents do and dlse."""
        random = torch.Generator().manual_seed(self.tokens)
        heads, of_keys = self.heads
        n = self.tokens if self.ends is None else self.ends[-1]
        shapes = {"q": (heads, 32), "k": (of_keys, 32), "v": (of_keys, 24), "do": (heads, 24)}
        found = {}
        for name, (h, d) in shapes.items():
            shape = (self.rows, h, n, d) if self.ends is None else (n, h, d)
            found[name] = torch.randn(shape, generator=random).to(self.dtype)
        shape = (self.rows, heads, n) if self.ends is None else (heads, n)
        of_lse = torch.promote_types(self.dtype, torch.float32)
        return found | {"dlse": torch.randn(shape, generator=random).to(of_lse)}

    def times(self) -> Tensor | None:
        if not self.timed:
            return None
        random = torch.Generator().manual_seed(1)
        n = self.tokens if self.ends is None else self.ends[-1]
        steps = torch.rand(self.rows, n, generator=random, dtype=torch.float64)
        times = steps.cumsum(1) + 5e7
        return times if self.ends is None else times[0]

    def results(self, given: dict[str, Tensor], times: Tensor | None) -> dict[str, Tensor]:
        """o, lse, dq, dk and dv of inputs, whole or of a process."""
        q, k, v = (given[name].detach().requires_grad_() for name in "qkv")
        words = {"enable_gqa": True, "return_lse": True, "times": times, **self.words}
        if self.ends is None:
            words |= {name: torch.tensor(x) for name, x in self.lengths.items()}
            o, lse = fused_attention(q, k, v, **words)
        else:
            ends = torch.tensor(self.ends, dtype=torch.int32)
            o, lse = fused_attention_varlen(q, k, v, ends, **words)
        dq, dk, dv = torch.autograd.grad((o, lse), (q, k, v), (given["do"], given["dlse"]))
        return {"o": o.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}

    def dim_of(self, name: str) -> int:
        """The dimension of tokens."""
        return (2 if self.ends is None else 1) if name in ("lse", "dlse") else self.token_dim

    def part(self, mesh: Any, x: Tensor, dim: int) -> Tensor:
        if self.sizes is None:
            return shard(mesh, x, dim)
        return x.split(self.sizes, dim)[mesh.get_local_rank()]

    def whole(self) -> dict[str, Tensor]:
        """The results of one process."""
        return self.results(self.inputs(), self.times())

    def truth(self) -> dict[str, Tensor]:
        given = {name: x.double() for name, x in self.inputs().items()}
        case = replace(self, words={**self.words, "backend": "reference"})
        return case.results(given, self.times())

    def split(self, mesh: Any) -> dict[str, Tensor]:
        """The results of all processes, in each of them."""
        given = {name: self.part(mesh, x, self.dim_of(name)) for name, x in self.inputs().items()}
        times = self.times()
        if times is not None:
            times = self.part(mesh, times, times.dim() - 1)
        with context_parallel(mesh, gathered=self.gathered):
            found = self.results(given, times)
        return {name: gather(mesh, x, self.dim_of(name)) for name, x in found.items()}


DOCUMENTS = (0, 100, 100, 200, 470, 611)
WINDOWS: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "window-of-shards": {"window": 250},
    "window-none": {"window": 0},
    "causal-window": {"window": 9, "is_causal": True},
    "lopsided": {"window": (3, 40)},
}
OPEN: dict[str, dict[str, Any]] = {
    "global": {},
    "causal": {"is_causal": True},
    "left-open": {"window": (None, 2)},
    "softcap": {"softcap": 3.0, "scale": 0.4},
}
PREFIXES: dict[str, dict[str, Any]] = {
    "prefix-window": {"window": 5, "global_prefix": 3},
    "prefix-causal": {"is_causal": True, "global_prefix": 2},
    "prefix-of-shards": {"window": 1, "global_prefix": 250},
}
CASES: dict[str, SplitCase] = {}
for _name, _words in (WINDOWS | OPEN | PREFIXES).items():
    CASES[f"dense-{_name}"] = SplitCase(_words)
    CASES[f"packed-{_name}"] = SplitCase(_words, ends=DOCUMENTS)
for _name in ("window", "causal", "prefix-window"):
    _words = (WINDOWS | OPEN | PREFIXES)[_name]
    CASES[f"bf16-{_name}"] = SplitCase(_words, ends=DOCUMENTS, dtype=torch.bfloat16)
    CASES[f"fp64-{_name}"] = SplitCase(_words, ends=DOCUMENTS, dtype=torch.float64)
    CASES[f"rows-{_name}"] = SplitCase(_words, rows=3, tokens=113)
    CASES[f"lengths-{_name}"] = SplitCase(
        _words, rows=3, tokens=113,
        lengths={"kv_lengths": (113, 0, 60), "q_lengths": (113, 20, 50)},
    )  # fmt: skip
    CASES[f"short-{_name}"] = SplitCase(_words, ends=(0, 1, 1, 2))
for _name in ("global", "causal", "left-open"):
    CASES[f"gathered-{_name}"] = SplitCase((OPEN)[_name], ends=DOCUMENTS, gathered=True)
CASES["bf16-global"] = SplitCase(dtype=torch.bfloat16)
CASES["key-lengths"] = SplitCase(rows=3, tokens=113, lengths={"kv_lengths": (113, 0, 60)})
CASES["timed"] = SplitCase({"time_window": 7.5}, ends=DOCUMENTS, timed=True)
CASES["timed-rows"] = SplitCase(
    {"time_window": 20.0, "window": (30, 12)}, rows=2, tokens=113, timed=True
)
CASES["timed-prefix"] = SplitCase(
    {"time_window": 7.5, "global_prefix": 2, "is_causal": True}, ends=DOCUMENTS, timed=True
)
CASES["one-head"] = SplitCase({"window": 64}, tokens=1000, heads=(1, 1))

# Three processes, of which one has nothing, and documents end with shards.
UNEVEN = {
    f"uneven-{name}": SplitCase(words, ends=DOCUMENTS, sizes=(200, 0, 411))
    for name, words in {**WINDOWS, **OPEN, **PREFIXES}.items()
}
# o, lse and dq have the bits of one process: all keys are attended to at once.
SAME_BITS = [
    name
    for name, case in (CASES | UNEVEN).items()
    if (case.gathered or any(x in name for x in WINDOWS)) and "global_prefix" not in case.words
    and not case.timed
]  # fmt: skip


def split_results(mesh: Any) -> dict[str, dict[str, Tensor]]:
    """The work of `spawned`: returns the results by case."""
    cases = CASES | (UNEVEN if mesh.size() == 3 else {})
    return {name: case.split(mesh) for name, case in cases.items()}
