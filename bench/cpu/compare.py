"""The CPU kernels of another revision against those of this tree.

    make bench-compare BASE=HEAD~1
    python bench/cpu/compare.py v0.1.0 -k "causal bf16" --json FILE

BASE is checked out in a temporary folder and built there. The benchmark is that of this tree for
both; each side has a process of its own, and their rounds take turns. A ratio above 1 means that
this tree is faster. BASE=HEAD shows the noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clinattn.tools.environment import cpu_count
from clinattn.tools.other_work import Spent, Watch, beside, disturbance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the packages
from base_tree import Refused, build, checked_out, commit_of, description, require_fresh_build
from rows_file import output_file, write_json

SIDE = Path(__file__).resolve().with_name("side.py")
ROOT = SIDE.parents[2]
# Rounds and seconds of one measurement. The first round warms up and is dropped.
MIN_ROUNDS, BUDGET_S = 5, 3.0
# Threads that a side left spinning are asleep after this pause.
PAUSE_S = 0.005
# No mapped pages for large results: whether glibc maps pages or reuses a hole depends on the cases
# before, and may differ between the sides, as 160 or 110 ms for 256 sequences of 128.
SAME_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
QUICK = (
    "full N1024 D64",
    "causal N1024 D64",
    "causal N1024 D128 bf16",
    "short rows fp32 forward",
    "window fp32",
)


class Side:
    """side.py with the clinattn of a tree."""

    def __init__(self, name: str, tree: Path, threads: int | None):
        self.name, self.tree = name, tree
        command = [sys.executable, str(SIDE)]
        command += [] if threads is None else [str(threads)]
        variables = {**os.environ, **SAME_MEMORY, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the sides itself
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, order: str, argument: Any = None) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({order: argument}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended, and so does what it has to say
        answer = self.process.stdout.readline()
        if not answer:
            raise Refused(
                f"{self.name} cannot run the benchmark of this tree (see above): expected a "
                "revision whose functions it knows"
            )
        return json.loads(answer)

    def facts(self) -> dict[str, Any]:
        facts = self.ask("facts")
        if Path(facts.pop("tree")).resolve() != self.tree.resolve():
            raise Refused(f"{self.name}: another clinattn came before that of {self.tree}")
        if reason := facts.pop("against"):
            raise Refused(f"{self.name}: the compiled CPU kernels cannot be used: {reason}")
        return facts


@dataclass(frozen=True)
class Row:
    """Seconds of each round, in turns. beside: what else ran, as tools.other_work has it."""

    case: str
    dtype: str
    passes: str
    base_s: list[float]
    here_s: list[float]
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return statistics.median(self.base_s) / statistics.median(self.here_s)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios of neighbouring rounds."""
        ratios = [b / h for b, h in zip(self.base_s, self.here_s, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high


def in_turns(
    base: Side, here: Side, way: str, rounds: int
) -> tuple[list[float], list[float], list[Spent]]:
    """Seconds of both sides and of the CPUs; the side that goes first alternates by round."""
    seconds: dict[Side, list[float]] = {base: [], here: []}
    spent: list[Spent] = []
    began = time.perf_counter()
    for i in range(rounds + 1):
        if i > MIN_ROUNDS and time.perf_counter() - began > BUDGET_S:
            break
        for side in (base, here) if i % 2 else (here, base):
            watch = Watch()
            answer = side.ask("time", way)
            spent.append(watch.spent(answer["process"]))
            seconds[side].append(answer["seconds"])
            time.sleep(PAUSE_S)
    return seconds[base][1:], seconds[here][1:], spent[2:]


def measurements(here: Side, words: str | None) -> list[list[str]]:
    """(entry, dtype, pass), each once; the quick ones where no words are given."""
    found = [m for each in (QUICK if words is None else [words]) for m in here.ask("list", each)]
    if not found:
        raise Refused(f"-k {words!r} fits no case: bench/cpu/cases.py has their names")
    return [m for i, m in enumerate(found) if m not in found[:i]]


def compare(
    base: Side, here: Side, words: str | None, rounds: int, failures: list[str], threads: int
) -> Iterator[Row]:
    for measurement in measurements(here, words):
        answers = {side.name: side.ask("prepare", measurement) for side in (base, here)}
        errors = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
        failures += [f"{' '.join(measurement)}, {name}: {why}" for name, why in errors.items()]
        if errors:
            continue
        entry, dtype, passes = measurement
        for way in answers[here.name]["ways"]:
            base_s, here_s, spent = in_turns(base, here, way, rounds)
            found = beside(spent, threads, cpu_count())
            yield Row(f"{entry} {way}".strip(), dtype, passes, base_s, here_s, found)


def table(rows: Sequence[Row], base: str) -> Table:
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("\ncase", "\ndtype", "\npass"):
        result.add_column(name, no_wrap=True)
    for name in (f"{base}\nms", "this tree\nms", "\nratio", "\nquartiles", "\nrounds"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.quartiles
        base_ms, here_ms = (1e3 * statistics.median(s) for s in (row.base_s, row.here_s))
        times = f"{base_ms:.3f}", f"{here_ms:.3f}"
        spread = f"{low:.2f} to {high:.2f}"
        name = row.case, row.dtype, row.passes
        ratio = f"{row.ratio:.2f}" + "*" * bool(row.beside.get("disturbed"))
        result.add_row(*name, *times, ratio, spread, str(len(row.here_s)))
    return result


def summary(rows: Sequence[Row]) -> str:
    mean = math.exp(statistics.fmean(math.log(row.ratio) for row in rows))
    return f"geometric mean of {len(rows)} ratios: {mean:.3f}; above 1 this tree is faster"


def content(rows: Sequence[Row], facts: dict[str, Any], interrupted: bool) -> dict[str, Any]:
    records = [asdict(row) | {"ratio": row.ratio} for row in rows]
    records = [record | record.pop("beside") for record in records]
    return {"kind": "compare", "interrupted": interrupted, **facts, "rows": records}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="a branch, a tag or a commit")
    parser.add_argument("-k", metavar="WORDS", help="labels with each of them (default: a few)")
    parser.add_argument("--rounds", type=int, default=25, help="at most (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    if given.rounds < 2 or (given.threads is not None and given.threads < 1):
        parser.error("--rounds is at least 2, and --threads at least 1")
    return given


def run(given: argparse.Namespace, err: Console) -> int:
    commit = commit_of(ROOT, given.base)
    require_fresh_build(ROOT)
    tree = description(ROOT)
    rows: list[Row] = []
    failures: list[str] = []
    facts: dict[str, Any] = {}
    interrupted = False
    try:
        with ExitStack() as stack:
            base_tree = stack.enter_context(checked_out(ROOT, commit))
            err.print(f"building {given.base} ({commit[:12]})", highlight=False)
            build(base_tree, commit)
            base = stack.enter_context(Side(given.base, base_tree, given.threads))
            here = stack.enter_context(Side("this tree", ROOT, given.threads))
            facts = {"base": base.facts(), "here": here.facts()}
            threads = facts["here"]["threads"]
            for row in compare(base, here, given.k, given.rounds, failures, threads):
                rows.append(row)
                err.print(f"{row.case} {row.dtype} {row.passes}: {row.ratio:.2f}", highlight=False)
    except KeyboardInterrupt:
        interrupted = True
    out = Console(soft_wrap=True, highlight=False)
    if rows:
        out.print("{cpu}, {threads} threads, torch {torch}, {date}".format(**facts["here"]))
        out.print(f"base {given.base} ({commit[:12]}), this tree {tree}")
        Console(width=max(out.width, 110), highlight=False).print(table(rows, given.base))
        out.print(summary(rows))
        if note := disturbance([row.beside for row in rows]):
            out.print(f"* {note}")
    for failure in failures:
        out.print("[red]failed[/red]", failure)
    if given.json and rows:
        write_json(given.json, content(rows, facts, interrupted))
    return 130 if interrupted else 1 if failures else 0


def main() -> int:
    given = arguments()
    err = Console(stderr=True, soft_wrap=True)
    try:
        return run(given, err)
    except Refused as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
