"""Times attention of short and many sequences against torch's: "never slower, at any length".

    make bench-short
    python bench/cpu/short.py --long --json FILE

A sweep over batch x heads from 1 to 3,072, tokens from 1 to 1,024 and head dimensions from 32 to
128, in fp32 and bf16, forward alone and backward alone. A call of microseconds is repeated until it
can be timed; ours and torch's take turns. The worst ratios are printed; a ratio above 1 means that
ours is faster.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import clinattn
from clinattn.tools.ways import way_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the packages
from cpu.cases import PASSES
from cpu.measure import CPU, DTYPES, Work, facts_of_this_process, work_of
from rows_file import output_file, write_json
from suites.problem import AttentionCase, OursDense, Sdpa, check, cotangent, inputs

BATCHES = ((1, 1), (1, 12), (16, 12), (256, 12))  # and heads
TOKENS = {False: (1, 8, 16, 32, 64, 128, 256), True: (*range(1, 13), 16, 20, 24, 32, 40, 48, 64,
          80, 100, 128, 200, 256, 512, 1024)}  # fmt: skip
DIMS = {False: (32, 64, 128), True: (32, 48, 64, 80, 96, 128)}
MOST_FLOP = 2e10  # of a forward pass; of more than that, long sequences tell
ROUNDS = 9
ROUND_S = 0.004  # of each side, of calls that take less
SHOWN = 25


@dataclass(frozen=True)
class Row:
    """Seconds of a call in each round."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    passes: str
    ours_s: list[float]
    torch_s: list[float]

    @property
    def ours_us(self) -> float:
        return 1e6 * statistics.median(self.ours_s)

    @property
    def torch_us(self) -> float:
        return 1e6 * statistics.median(self.torch_s)

    @property
    def ratio(self) -> float:
        """The middle of the rounds' ratios: what disturbs a round disturbs both of its sides."""
        return statistics.median(t / o for t, o in zip(self.torch_s, self.ours_s, strict=True))

    @property
    def ns_per_pair(self) -> float:
        """Our time for a query and a key."""
        return 1e3 * self.ours_us / (self.batch * self.heads * self.tokens**2)

    def record(self) -> dict[str, Any]:
        derived = "ours_us", "torch_us", "ratio", "ns_per_pair"
        return asdict(self) | {name: getattr(self, name) for name in derived}


def repeated(work: Work, times: int) -> float:
    """Seconds of a call, of so many in a row."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def rounds_of(works: Sequence[Work], rounds: int) -> list[list[float]]:
    """Seconds of a call of each work in each round; the first calls warm up."""
    took = [min(repeated(work, 3) for _ in range(3)) for work in works]
    times = [max(1, round(ROUND_S / seconds)) for seconds in took]
    turns = [
        [repeated(work, n) for work, n in zip(works, times, strict=True)] for _ in range(rounds)
    ]
    return [list(seconds) for seconds in zip(*turns, strict=True)]


def shapes(long: bool) -> Iterator[tuple[int, int, int, int]]:
    """(batch, heads, tokens, head_dim)."""
    for (batch, heads), dim, n in itertools.product(BATCHES, DIMS[long], TOKENS[long]):
        if 4 * batch * heads * n * n * dim <= MOST_FLOP:
            yield batch, heads, n, dim


def measure(
    shape: tuple[int, int, int, int], dtype: str, passes: Sequence[str], rounds: int
) -> Iterator[Row]:
    """A row for each pass; AssertionError where ours errs."""
    batch, heads, n, dim = shape
    few = AttentionCase((n,) * min(batch, 2), 1, dim)
    # of one key dq and dk are 0, and so is the error that plain maths would allow
    check(few, DTYPES[dtype], CPU, (OursDense,), gradients=n > 2)
    case = AttentionCase((n,) * batch, heads, dim)
    qkv = inputs(case, DTYPES[dtype], CPU)
    ways, d_out = [OursDense(case, qkv), Sdpa(case, qkv)], cotangent(qkv[0])
    for one in passes:
        works = [work_of(way, one, d_out) for way in ways]
        yield Row(*shape, dtype, one, *rounds_of(works, rounds))


def worst(rows: Sequence[Row], shown: int) -> Table:
    result = Table(box=None, pad_edge=False, header_style="bold")
    times = [f"{way_name(name)}, us" for name in ("clinattn", "sdpa")]
    for name in ("batch x heads", "tokens", "head dim", "dtype", "pass", *times):
        result.add_column(name, justify="right")
    result.add_column("ratio", justify="right")
    for row in sorted(rows, key=lambda row: row.ratio)[:shown]:
        sizes = f"{row.batch} x {row.heads}", str(row.tokens), str(row.head_dim)
        times = f"{row.ours_us:.2f}", f"{row.torch_us:.2f}", f"{row.ratio:.2f}"
        result.add_row(*sizes, row.dtype, row.passes, *times)
    return result


def summary(rows: Sequence[Row]) -> str:
    slower = sum(row.ratio < 1 for row in rows)
    mean = statistics.geometric_mean(row.ratio for row in rows)
    told = f"{slower} of {len(rows)} slower than torch SDPA"
    return f"{told}; geometric mean of the ratios {mean:.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="more lengths and head dimensions")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    if given.rounds < 1 or (given.threads is not None and given.threads < 1):
        parser.error("--rounds and --threads are at least 1")
    return given


def main() -> int:
    given = arguments()
    if not clinattn.backends()["cpu"]:
        print(f"the compiled CPU kernels: {clinattn.backends()['cpu']}", file=sys.stderr)
        return 1
    if given.threads:
        torch.set_num_threads(given.threads)
    facts = facts_of_this_process()
    rows: list[Row] = []
    interrupted = False
    try:
        for dtype, shape in itertools.product(given.dtypes, shapes(given.long)):
            rows += measure(shape, dtype, given.passes, given.rounds)
    except KeyboardInterrupt:
        interrupted = True
    console = Console(soft_wrap=True, highlight=False)
    console.print("{cpu}, {threads} threads, torch {torch}, {commit}, {date}".format(**facts))
    if rows:
        console.print(worst(rows, SHOWN))
        console.print(summary(rows))
    if given.json:
        content = {"kind": "short", "interrupted": interrupted, **facts}
        write_json(given.json, content | {"rows": [row.record() for row in rows]})
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
