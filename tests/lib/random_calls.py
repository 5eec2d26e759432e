"""Calls of random arguments, both passes and summaries, on inputs between guard pages.

    python tests/lib/random_calls.py --seed 0 --first 0 --calls 100 [--module _C.py]

Prints the number and the arguments of each call before it is made: the last line is that of the one
that ended the process. Each follows from the seed and its number alone. --module:
clinattn._C beside another build of its library.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import fresh_memory

fresh_memory.fill_with_nan()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Calls of random arguments.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--module", type=Path)
    ARGUMENTS = parser.parse_args()
    if ARGUMENTS.module:
        from module_builds import load

        load(ARGUMENTS.module)

import torch  # noqa: E402
from cases import Case  # noqa: E402
from features import SEED  # noqa: E402
from guarded import guarded, spaced  # noqa: E402
from mixtures import mixed  # noqa: E402
from summaries import REDUCTIONS, SummaryProblem  # noqa: E402
from support import DTYPES, Problem, dtype_id  # noqa: E402
from torch import Tensor  # noqa: E402

import clinattn  # noqa: E402
from clinattn.encoder.linear_op import (  # noqa: E402
    ACTIVATIONS,
    LAYER_NORM,
    NO_NORM,
    RMS_NORM,
    Dropped,
    Form,
    NormOf,
    run,
)

DIMS = [8, 16, 24, 32, 40, 64, 80, 96, 128, 256]
STRIDES = ["contiguous", "contiguous", "transposed", "sliced", "reversed", "expanded"]
SHAPES = ["qk", "11qk", "b1qk", "1hqk", "bhqk", "b11k", "bh1k", "k", "bhq1", "1h11"]
MASKS = [f"{kind}:{shape}" for kind in ("bool", "float") for shape in SHAPES]
MASKS += ["left:b11k", "right:b11k", "none:qk", "none:b11k"]
LARGEST = 3e5  # multiply-adds of a pass: emulated instructions take a second for some millions
DEFAULTS = {x.name: x.default for x in fields(Case)}


@dataclass(frozen=True)
class Rotary:
    """cu_seqlens are the ends of packed sequences of `lengths`; without: (batch, heads, n, dim)."""

    lengths: tuple[int, ...]
    batch: int | None
    heads: int
    kv_heads: int
    dim: int
    rotary_dim: int
    interleaved: bool


@dataclass(frozen=True)
class Product:
    """A linear layer with what follows it, and the products of its backward pass."""

    rows: int
    columns: int
    depth: int
    bias: bool
    activation: str | None
    gated: bool
    residual: bool
    norm: int
    dropout_p: float


@dataclass(frozen=True)
class Call:
    """gap: elements between rows of inputs. at_end: inputs end where a page does.

    reduce: of a summary of attention weights in place of both passes.
    """

    number: int
    problem: Case | Rotary | Product
    dtype: torch.dtype
    instruction_set: str
    threads: int
    gap: int
    at_end: bool
    reduce: str | None = None

    def __str__(self) -> str:
        said = {name: x for name, x in asdict(self.problem).items() if x != DEFAULTS.get(name)}
        said |= {"gap": self.gap, "at_end": self.at_end, "threads": self.threads}
        said |= {"reduce": self.reduce} if self.reduce else {}
        words = [f"{name}={x!r}" for name, x in said.items() if name != "id"]
        words = [type(self.problem).__name__, dtype_id(self.dtype), *words]
        return " ".join([str(self.number), self.instruction_set, *words])

    def placed(self, x: Any) -> Any:
        """A tensor between guard pages; anything else as it is."""
        if not isinstance(x, Tensor):
            return x
        copy = guarded(spaced(x.detach(), self.gap), self.at_end)
        return copy.requires_grad_(x.requires_grad)

    def run(self) -> None:
        if isinstance(self.problem, Case):
            results = (attention if self.reduce is None else summary)(self, self.problem)
        elif isinstance(self.problem, Rotary):
            results = rotary(self, self.problem)
        else:
            results = product(self, self.problem)
        for x in results:
            if x is not None and x.isnan().any():
                raise AssertionError(f"NaN in a result of shape {tuple(x.shape)}")


def draw(seed: int, number: int, sets: list[str]) -> Call:
    chance = random.Random(f"{seed} {number}")
    instruction_set, dtype = chance.choice(sets), chance.choice(DTYPES)
    problem = draw_problem(chance, instruction_set != "scalar")
    if isinstance(problem, Product) and dtype != torch.bfloat16:
        dtype = torch.float32
    return Call(
        number,
        problem,
        dtype,
        instruction_set,
        threads=chance.choice([1, 1, 2, 3]),
        gap=chance.choice([0, 0, 1, 3, 8]),
        at_end=chance.random() < 0.8,
        reduce=chance.choice(REDUCTIONS) if chance.random() < 0.25 else None,
    )


def draw_problem(chance: random.Random, has_product: bool) -> Case | Rotary | Product:
    kind = chance.random()
    if kind < 0.05:
        return draw_rotary(chance)
    if kind < 0.15 and has_product:
        return Product(
            rows=chance.choice([chance.randint(0, 140), 260]),
            columns=2 * chance.randint(0, 70),
            depth=chance.randint(0, 300),
            bias=chance.random() < 0.5,
            activation=chance.choice(list(ACTIVATIONS)),
            gated=chance.random() < 0.3,
            residual=chance.random() < 0.5,
            norm=chance.choice([NO_NORM, LAYER_NORM, RMS_NORM]),
            dropout_p=chance.choice([0.0, 0.0, 0.3, 1.0]),
        )
    case = draw_case(chance)
    while case.work > LARGEST and chance.random() < 0.99:
        case = draw_case(chance)
    return case


def draw_rotary(chance: random.Random) -> Rotary:
    kv_heads, dim = chance.randint(1, 2), 2 * chance.randint(1, 128)
    return Rotary(
        lengths=tuple(chance.randint(0, 40) for _ in range(chance.randint(1, 3))),
        batch=chance.choice([None, 1, 2]),
        heads=kv_heads * chance.randint(1, 3),
        kv_heads=kv_heads,
        dim=dim,
        rotary_dim=2 * chance.randint(1, dim // 2),
        interleaved=chance.random() < 0.5,
    )


def draw_case(chance: random.Random) -> Case:
    maybe = lambda draw, share=0.25: draw() if chance.random() < share else None
    tokens = lambda: chance.choice([chance.randint(0, 9), chance.randint(1, 70), 64, 130])
    kv_heads = chance.choice([1, 1, 2, 3])
    side = lambda: chance.choice([None, 0, chance.randint(0, 90)])
    shared: dict[str, Any] = {
        "heads": kv_heads * chance.choice([1, 1, 2, 3]),
        "kv_heads": kv_heads,
        "dim": chance.choice([chance.randint(1, 256), chance.randint(1, 40), chance.choice(DIMS)]),
        "value_dim": maybe(lambda: chance.choice([chance.randint(1, 256), chance.choice(DIMS)])),
        "causal": chance.random() < 0.3,
        "window": maybe(lambda: chance.choice([chance.randint(0, 90), (side(), side())])),
        "scale": maybe(lambda: chance.uniform(-1, 1)),
        "strides": chance.choice(STRIDES),
        "cotangent": chance.choice(["random", "random", "expanded", "o", "lse"]),
    }
    drawn = {name: draw(chance) for name, draw in FEATURES.items() if chance.random() < 0.25}
    drawn["times"] = chance.choice(["float32", "float64", "int64"])
    if chance.random() < 0.4:
        nq = tuple(tokens() for _ in range(chance.randint(1, 5)))
        nk = chance.choice([nq, tuple(chance.sample(nq, len(nq)))])
        return mixed(Case("random", nq=nq, nk=nk, tail=chance.randint(0, 3), **shared), drawn)
    batch, nq = chance.randint(1, 3), tokens()
    nk = chance.choice([nq, tokens()])
    if "global_prefix" in drawn:
        drawn["global_prefix"] = min(drawn["global_prefix"], nk)
    lengths = lambda n: tuple(chance.choice([0, n, chance.randint(0, n)]) for _ in range(batch))
    case = Case(
        "random",
        batch=batch,
        nq=nq,
        nk=nk,
        mask=maybe(lambda: chance.choice(MASKS), 0.5),
        expand_mask=chance.random() < 0.2,
        q_lengths=maybe(lambda: lengths(nq)),
        kv_lengths=maybe(lambda: lengths(nk)),
        **shared,
    )
    return mixed(case, drawn)


FEATURES = {
    "mask_grad": lambda chance: True,
    "segments": lambda chance: chance.randint(1, 6),
    "time_window": lambda chance: chance.choice([0.25, 5.0, 12.0, float("inf")]),
    "time_decay": lambda chance: True,
    "alibi": lambda chance: chance.choice(["h", "bh"]),
    "relative": lambda chance: chance.randint(0, 140),
    "softcap": lambda chance: chance.uniform(0.5, 20),
    "global_prefix": lambda chance: chance.randint(1, 70),
    "dropout": lambda chance: chance.choice([0.05, 0.5, 1.0]),
}


Results = Iterable[Tensor | None]


def attention(call: Call, case: Case) -> Results:
    problem = Problem(case, call.dtype, seed=call.number)
    inputs, keywords = problem.arguments
    inputs = [call.placed(x) for x in inputs]
    keywords = {name: call.placed(x) for name, x in keywords.items()}
    cotangents = [call.placed(x) for x in problem.cotangents()]
    function = clinattn.fused_attention_varlen if case.packed else clinattn.fused_attention
    torch.manual_seed(SEED)
    results = function(*inputs, **keywords, backend="cpu")
    leaves = [x for x in (*inputs, *keywords.values()) if isinstance(x, Tensor) and x.requires_grad]
    given = [(x, y) for x, y in zip(results, cotangents, strict=True) if y is not None]
    outputs, directions = zip(*given, strict=True)
    return *results, *torch.autograd.grad(outputs, leaves, directions, allow_unused=True)


def summary(call: Call, case: Case) -> Results:
    assert call.reduce is not None
    problem = SummaryProblem(replace(case, dropout=None), call.dtype, seed=call.number)
    tensors, keywords = problem.summary_arguments(call.reduce)
    given = {name: call.placed(x) for name, x in keywords.items()}
    found = clinattn.attention_summary(*map(call.placed, tensors), **given, backend="cpu")
    return found if call.reduce == "topk" else (found,)


def rotary(call: Call, problem: Rotary) -> Results:
    random = torch.Generator().manual_seed(call.number)
    tokens, packed = sum(problem.lengths), problem.batch is None
    ends = torch.tensor([0, *problem.lengths]).cumsum(0).int() if packed else None

    def inputs(heads: int) -> Tensor:
        shape = (tokens, heads) if problem.batch is None else (problem.batch, heads, tokens)
        return call.placed(torch.randn(*shape, problem.dim, generator=random).to(call.dtype))

    qk = [inputs(x).requires_grad_() for x in (problem.heads, problem.kv_heads)]
    directions = [inputs(x) for x in (problem.heads, problem.kv_heads)]
    turned = clinattn.rotary(
        *qk,
        call.placed(torch.arange(tokens)),
        rotary_dim=problem.rotary_dim,
        interleaved=problem.interleaved,
        cu_seqlens=call.placed(ends),
        backend="cpu",
    )
    return *turned, *torch.autograd.grad(turned, qk, directions)


def product(call: Call, problem: Product) -> Results:
    random = torch.Generator().manual_seed(call.number)
    draw = lambda *shape: call.placed(torch.randn(*shape, generator=random).to(call.dtype))
    rows, columns = problem.rows, problem.columns // 2 if problem.gated else problem.columns
    x, weight = draw(rows, problem.depth), draw(problem.columns, problem.depth)
    residual = draw(rows, columns) if problem.residual else None
    vector = lambda size: guarded(torch.ones(size), call.at_end)
    bias = vector(problem.columns) if problem.bias else None
    norm = NormOf(problem.norm, vector(columns), vector(columns), 1e-5)
    in_bfloat16 = call.dtype == torch.bfloat16
    form = Form(problem.activation, problem.gated, in_bfloat16, call.dtype)
    dropped = Dropped(problem.dropout_p, call.number)
    y, u = run(form, x, weight, bias, residual, norm, call.dtype, dropped)
    plain = Form(None, False, in_bfloat16, call.dtype)
    number = ACTIVATIONS[problem.activation]
    gradient = torch.ops.clinattn.cpu_linear_activation_backward
    dy = draw(rows, columns)
    du = call.placed(gradient(dy, u, number, problem.gated, *dropped, call.dtype))
    return y, u, run(plain, du, weight.t(), None)[0], run(plain, du.t(), x.t(), None)[0]


def main(seed: int, first: int, calls: int) -> None:
    from clinattn import _C

    for number in range(first, first + calls):
        call = draw(seed, number, _C.instruction_sets())
        print(call, flush=True)
        _C.set_instruction_set(call.instruction_set)
        torch.set_num_threads(call.threads)
        call.run()


if __name__ == "__main__":
    main(ARGUMENTS.seed, ARGUMENTS.first, ARGUMENTS.calls)
    sys.exit(0)
