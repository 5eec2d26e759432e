"""Encoders of transformers under clinattn, torch, torch.compile, OpenVINO and ONNX Runtime.

    make bench-engines                                     some 15 minutes on two cores
    make bench-engines BENCH_ARGS=--quick                  some two, with smaller loads
    python bench/models/engines/run.py -k "notes fp32"     loads and classes with both words
    python bench/models/engines/run.py --json FILE         keep the rows

Models have published sizes and random weights, and fewer layers than published, which a row says
(--layers takes others). Each engine computes every load by its best legal batching, padded and
sorted by length, or packed, with its own hints and the same number of threads. Outputs are compared
with fp32 torch on each sequence alone before anything is timed, and one with NaN in a real token is
not timed. Within a class of precision engines take turns, and a rate is the median of rounds.
Everything is inference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, JustifyMethod
from rich.table import Table

from clinattn.tools.environment import environment
from clinattn.tools.other_work import disturbance
from clinattn.tools.peaks import peaks_in_force
from clinattn.tools.report.sections import section

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/models
from engines.engine import KINDS, Engine
from engines.group import Setting, measure
from engines.loads import LOADS, QUICK_SHARE, Load, published_layers, write_model
from engines.registry import ENGINES
from engines.rows import Row
from rows_file import output_file, write_json

# The fewest and the most, and the seconds of the rounds between these
ROUNDS, BUDGET_S = range(2, 9), 20.0
QUICK_ROUNDS, QUICK_BUDGET_S = range(2, 6), 3.0
PACKAGES = ("openvino", "onnxruntime", "onnx", "nncf")
CPU = torch.device("cpu")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="WORDS", default="", help="groups that have all of them")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--layers", type=int, help="of every model (default: those of its load)")
    parser.add_argument("--share", type=int, metavar="N", help="an N-th of every load's sequences")
    parser.add_argument("--rounds", type=int, help="exactly (default: by the clock, at least 2)")
    parser.add_argument("--threads", type=int, help="of every engine (default: as torch chooses)")
    parser.add_argument("--quick", action="store_true", help="smaller loads, fewer layers")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    names = {engine.name for engine in ENGINES}
    if unknown := set(given.engines or ()) - names:
        parser.error(f"--engines {' '.join(sorted(unknown))}: expected some of {sorted(names)}")
    for name in ("layers", "share", "rounds", "threads"):
        number = getattr(given, name)
        if number is not None and number < 1:
            parser.error(f"--{name}: got {number}, expected at least 1")
    for load in LOADS:
        if (given.layers or 1) > published_layers(load.model):
            most = published_layers(load.model)
            parser.error(f"--layers: got {given.layers}, expected at most {most} ({load.model})")
    return given


def chosen(given: argparse.Namespace) -> list[tuple[Load, list[str]]]:
    """Loads, and the classes of each, whose label has all words."""
    found = []
    for load in LOADS:
        label = f"{load.name} {load.title} {load.model}".replace(",", "")
        asked = set(given.k.replace(",", "").split())
        kinds = [kind for kind in KINDS if asked <= set(f"{label} {kind}".split())]
        load = load.shared(given.share or (QUICK_SHARE if given.quick else 1))
        load = load.quick() if given.quick else load
        if kinds:
            found.append((load.with_layers(given.layers) if given.layers else load, kinds))
    return found


def usable(names: list[str] | None) -> tuple[list[Engine], list[str]]:
    """The engines asked for that can run here, and a line for each of the others."""
    asked = [engine for engine in ENGINES if names is None or engine.name in names]
    lines = {engine: engine.missing() for engine in asked}
    return [x for x in asked if lines[x] is None], [line for line in lines.values() if line]


def refusals(given: argparse.Namespace, engines: list[Engine]) -> dict[tuple[str, Engine], str]:
    """Lines on the engines, by load, that this machine's memory cannot hold."""
    found = {
        (load.name, engine): engine.too_large(load)
        for load, kinds in chosen(given)
        for engine in engines
        if engine.kind in kinds
    }
    return {key: line for key, line in found.items() if line is not None}


def measured(
    given: argparse.Namespace,
    engines: list[Engine],
    refused: dict[tuple[str, Engine], str],
    console: Console,
) -> Iterator[Row]:
    rounds, budget = (QUICK_ROUNDS, QUICK_BUDGET_S) if given.quick else (ROUNDS, BUDGET_S)
    if given.rounds:
        rounds = range(given.rounds, given.rounds)
    started = time.perf_counter()
    asked: list[int] = []

    def interrupt(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)

    def say(words: str) -> None:
        if asked:  # an engine's converter caught the exception and went on
            raise KeyboardInterrupt
        spent = time.perf_counter() - started
        console.print(f"{spent:4.0f} s  {words}", highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory() as place:
        for load, kinds in chosen(given):
            folder = Path(place) / f"{load.model} {load.layers}"
            if not folder.exists():
                write_model(load.model, load.layers, folder)
            threads = torch.get_num_threads()
            setting = Setting(load, load.drawn(), folder, threads, rounds, budget)
            say(f"{load.name}: fp32 torch on each sequence alone")
            truth = setting.truth()
            for kind in kinds:
                own = [engine for engine in engines if engine.kind == kind]
                own = [engine for engine in own if (load.name, engine) not in refused]
                where = f"{load.name}, {kind}"
                if own:
                    yield from measure(setting, own, truth, lambda x, at=where: say(f"{at}: {x}"))


def facts() -> dict[str, Any]:
    found = environment(CPU) | peaks_in_force()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def shown(content: dict[str, Any], console: Console) -> None:
    found = section(content)
    console.print(
        "{cpu}, {threads} threads, torch {torch}, {commit}, {date}".format(**content["environment"])
    )
    for own in found.tables:
        table = Table(title=own.title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(own.header):
            justify: JustifyMethod = "left" if i < own.labels else "right"
            table.add_column(name, justify=justify, no_wrap=i < 3)
        for row in own.rows:
            table.add_row(*row)
        console.print(table)
    for line in content["absent"]:
        console.print(f"left out: {line}", highlight=False, soft_wrap=True)
    if note := disturbance(content["rows"]):
        console.print(f"* {note}")
    console.print(found.conclusion, soft_wrap=True)


def main() -> int:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    if not chosen(given):
        print(f"error: -k {given.k!r} fits no load and class", file=sys.stderr)
        return 2
    stderr = Console(stderr=True)
    engines, absent = usable(given.engines)
    refused = refusals(given, engines)
    absent += refused.values()
    for line in absent:
        stderr.print(f"left out: {line}", highlight=False, soft_wrap=True)
    content: dict[str, Any] = {"kind": "engines", "quick": given.quick, "interrupted": True}
    content |= {"environment": facts(), "absent": absent, "rows": []}
    try:
        for row in measured(given, engines, refused, stderr):
            content["rows"].append(row.record())
            if given.json:
                write_json(given.json, content)
        content["interrupted"] = False
    except KeyboardInterrupt:
        stderr.print("interrupted")
    if not content["rows"]:
        return 130 if content["interrupted"] else 1
    if given.json:
        write_json(given.json, content)
    shown(content, Console(width=160))
    return 130 if content["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
