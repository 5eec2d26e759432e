"""A transformer of FEMR's shape on a CPU, with the N x N scores that FEMR builds there and without.

    python bench/models/femr.py                                     some minutes
    python bench/models/femr.py --json bench/results/femr-NAME.json keep the rows

The model has FEMR's defaults (6 layers, 12 heads of 64, a width of 496) unless --layers says fewer.
A batch is one row of packed patients, each half as long as the one before. Hidden states are
compared before anything is timed, the ways take turns in one process, a time is the median of
rounds, and memory is the peak of one pass above what was held before it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clinattn.integrations.xformers import memory_efficient_attention
from clinattn.tools.benchmark.measure import peak_memory, quartiles
from clinattn.tools.environment import environment
from clinattn.tools.other_work import Watch, disturbance, here
from clinattn.tools.peaks import peaks_in_force

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from femr_shaped import Shape, Transformer, patients, scores_attention

from rows_file import output_file, write_json
from turns import in_turns

WAYS = {"scores": scores_attention, "clinattn": memory_efficient_attention}
BOUND = 1e-4  # of hidden states, which are of the size of 1 after the last norm
SHORTEST = 16
CPU = torch.device("cpu")


def lengths(tokens: int) -> list[int]:
    """Half of the tokens, a quarter, and so on; what is left is one patient."""
    found = []
    while tokens >= 2 * SHORTEST:
        found.append(tokens // 2)
        tokens -= tokens // 2
    return [*found, tokens]


def infer(model: Transformer, batch: tuple[Tensor, Tensor, list[int]]) -> Tensor:
    with torch.no_grad():
        return model(*batch)


def train(model: Transformer, batch: tuple[Tensor, Tensor, list[int]]) -> None:
    """Forward and backward; the gradients are thrown away."""
    model(*batch).sum().backward()
    model.zero_grad(set_to_none=True)


PASSES: dict[str, Callable[..., Any]] = {"infer": infer, "train": train}


def measure(given: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    shape = Shape(layers=given.layers)
    model = Transformer(shape, scores_attention)
    for tokens in given.tokens:
        patient_lengths = lengths(tokens)
        batch = (*patients(patient_lengths, shape.vocab_size), patient_lengths)

        def work(way: str, run: Callable[..., Any], batch: Any = batch) -> Any:
            model.attention = WAYS[way]
            return run(model, batch)

        error = float((work("clinattn", infer) - work("scores", infer)).abs().max())
        assert error <= BOUND, f"hidden states differ by {error:.2g}; nothing was timed"
        for name in given.passes:
            console.print(f"{tokens} tokens, {name}", highlight=False)
            works = {way: partial(work, way, PASSES[name]) for way in WAYS}
            watch = Watch()
            seconds = in_turns(works, given.rounds)
            spent = watch.spent()
            yield {
                "tokens": tokens,
                "patients": patient_lengths,
                "layers": shape.layers,
                "pass": name,
                "largest_difference": error,
                **here([spent], CPU),
                "seconds": seconds,
                "tokens_per_s": {
                    way: quartiles([tokens / s for s in times]) for way, times in seconds.items()
                },
                "peak_memory_bytes": {way: peak_memory(x, CPU) for way, x in works.items()},
            }


def table(rows: list[dict[str, Any]]) -> Table:
    columns = ("tokens", "pass", *(f"{way} tokens/s" for way in WAYS), "speed")
    shown = Table(*columns, *(f"{way} MiB" for way in WAYS), show_edge=False)
    for row in rows:
        rate = [row["tokens_per_s"][way]["median"] for way in WAYS]
        peaks = [row["peak_memory_bytes"][way] for way in WAYS]
        memory = ["" if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks]
        shown.add_row(
            str(row["tokens"]), row["pass"] + "*" * row["disturbed"],
            *(f"{x:,.0f}" for x in rate), f"{rate[1] / rate[0]:.2f}x", *memory,
        )  # fmt: skip
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--layers", type=int, default=Shape.layers, help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    counts = (*given.tokens, given.layers, given.rounds, given.threads or 1)
    if min(counts) < 1 or given.threads == 0:
        parser.error("--tokens, --layers, --rounds and --threads are at least 1")
    return given


def main() -> int:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = list(measure(given, Console(stderr=True)))
    facts = environment(CPU) | peaks_in_force()
    print("{cpu}, {threads} threads, torch {torch}, {commit}, {date}".format(**facts))
    Console(width=110).print(table(rows))
    if note := disturbance(rows):
        print(f"* {note}")
    if given.json:
        write_json(given.json, {"environment": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
