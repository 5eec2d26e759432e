"""Models as ETHOS-ARES, CEHR-GPT and MEDS-EIC-AR build them, with their own attention and clinattn.

    python bench/models/clinical_code.py                 two layers of each, a minute or two
    python bench/models/clinical_code.py --layers 6 --rounds 9 --train

Sizes of a layer, lengths and masks are those of the projects: 12 heads of 64 over 2,048 causal
tokens; 12 heads of 64 over a packed row of 4,096 places; 4 heads of 64 over padded rows of codes.
Without clinattn they compute by torch's SDPA, by a score for every pair of tokens, and by SDPA.
The two take turns in one process, and a time is the median of rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from clinattn.tools.benchmark.measure import peak_memory, quartiles
from clinattn.tools.environment import environment
from clinattn.tools.peaks import peaks_in_force

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from clinical_code import CODES, Code

from rows_file import output_file, write_json

SIZES = {"ETHOS-ARES": (12, 768), "CEHR-GPT": (12, 768), "MEDS-EIC-AR": (4, 256)}
LENGTHS = {
    "ETHOS-ARES": (2048,),
    "CEHR-GPT": (1500, 900, 700, 520, 300, 170),
    "MEDS-EIC-AR": (1024, 770, 410, 96),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2, help="of each model (2)")
    parser.add_argument("--rounds", type=int, default=5, help="of measurements (5)")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    for name in ("layers", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"--{name}: got {getattr(given, name)}, expected at least 1")
    return given


def passes(code: Code, layers: int, train: bool) -> dict[str, Callable[[], None]]:
    """A pass of the same weights on the same batch, without clinattn and with it."""
    heads, width = SIZES[code.name]
    batch = code.batch(LENGTHS[code.name], width)
    models = {}
    for replaced in (False, True):
        torch.manual_seed(0)
        models[replaced] = code.build(replaced, layers, heads, width).eval()

    def one(replaced: bool) -> None:
        with torch.set_grad_enabled(train), code.after() if replaced else code.before():
            output = models[replaced](**batch)[code.output]
            if train:
                output.square().mean().backward()
                models[replaced].zero_grad(set_to_none=True)

    return {"before": lambda: one(False), "after": lambda: one(True)}


def measured(code: Code, given: argparse.Namespace) -> dict[str, object]:
    """A row: seconds and peak memory of both."""
    works = passes(code, given.layers, given.train)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(given.rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if i:
                seconds[name].append(time.perf_counter() - started)
    cpu = torch.device("cpu")
    row: dict[str, object] = {"code": code.name, "layers": given.layers, "train": given.train}
    for name, work in works.items():
        row[name] = quartiles(seconds[name]) | {"peak_memory_bytes": peak_memory(work, cpu)}
    return row


def main() -> None:
    given = arguments()
    facts = environment(torch.device("cpu")) | peaks_in_force()
    table = Table("code", "before, ms", "clinattn, ms", "times as fast", "MiB before", "MiB after")
    rows = []
    for code in CODES:
        row = measured(code, given)
        rows.append(row)
        before, after = row["before"], row["after"]
        assert isinstance(before, dict) and isinstance(after, dict)
        memory = [
            "" if x["peak_memory_bytes"] is None else f"{x['peak_memory_bytes'] / 2**20:,.0f}"
            for x in (before, after)
        ]
        ms = [f"{x['median'] * 1e3:,.0f}" for x in (before, after)]
        table.add_row(code.name, *ms, f"{before['median'] / after['median']:.2f}", *memory)
    console = Console()
    console.print("{cpu}, {threads} threads, torch {torch}, {commit}, {date}".format(**facts))
    console.print(table)
    if given.json:
        write_json(given.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
