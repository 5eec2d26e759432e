"""The CPU kernels against torch's SDPA: ratio to torch and fraction of peak, pass by pass.

    python bench/cpu/run.py                                   all cases, under eight minutes
    python bench/cpu/run.py -k "causal bf16 backward"         these alone
    python bench/cpu/run.py --json bench/results/NAME.json    keep the rows

Ours is checked against fp64 before it is timed. Rounds interleave ours and torch, and a time is the
median of wall times. FLOP are 4D a visible pair forward and 10D backward, padding not counted. The
peak is a loop of multiply-adds in registers, measured beside each case on the same threads: AMX's
where AMX is in force, over three for fp16 and over six for fp32, which need so many bf16 products
for each of their own; AVX512-BF16's for bf16 where that is in force; else FMA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import clinattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the packages
from cpu.cases import ENTRIES, Entry, chosen
from cpu.measure import facts_of_this_process, measure
from cpu.rows import Row, content, summary, table
from rows_file import output_file, write_json

ROUNDS = 15
TABLE_WIDTH = 145


def forced(isa: str) -> dict[str, str]:
    """Variables that hold both sides to an instruction set: ATen's own variable leaves MKL free."""
    return {
        "CLINATTN_CPU_ISA": isa,
        "ATEN_CPU_CAPABILITY": isa,
        "MKL_ENABLE_INSTRUCTIONS": isa.upper(),
        "ONEDNN_MAX_CPU_ISA": isa.upper(),
    }


def measure_apart(entry: Entry, dtype: str, passes: list[str], rounds: int) -> Iterator[Row]:
    """Yields rows measured in a process whose instruction set is forced."""
    assert entry.isa is not None
    job = {"entry": entry.name, "dtype": dtype, "passes": passes, "rounds": rounds}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    command += ["--threads", str(torch.get_num_threads())]
    variables = {**os.environ, **forced(entry.isa)}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Row.from_record(json.loads(line))
    assert process.returncode == 0, f"exit {process.returncode}"


def do_job(text: str) -> None:
    """The other end of measure_apart: rows go to stdout, a line each."""
    job = json.loads(text)
    name = job.pop("entry")
    entry = next(entry for entry in ENTRIES if entry.name == name)
    for row in measure(entry, facts=facts_of_this_process(), **job):
        print(json.dumps(row.record()), flush=True)


def measure_all(words: str, rounds: int, console: Console) -> tuple[list[Row], list[str], bool]:
    """Rows, what failed, and whether Ctrl-C cut the run short."""
    facts = facts_of_this_process()
    todo = list(chosen(ENTRIES, words))
    rows: list[Row] = []
    failures: list[str] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        try:
            for entry, dtype, passes in todo:
                progress.update(task, description=f"{entry.name} {dtype}")
                if entry.isa:
                    found = measure_apart(entry, dtype, passes, rounds)
                else:
                    found = measure(entry, dtype, passes, rounds, facts)
                try:
                    for row in found:
                        rows.append(row)
                        progress.console.print(line(row), highlight=False, soft_wrap=True)
                except AssertionError as error:
                    failures.append(f"{entry.name} {dtype}: {error}")
                progress.advance(task)
        except KeyboardInterrupt:
            return rows, failures, True
    return rows, failures, False


def line(row: Row) -> str:
    times = f"{row.ours_ms:9.2f} ms, torch SDPA {row.torch_ms:9.2f} ms, {row.ratio:6.2f} times"
    return f"{row.case:24} {row.dtype} {row.passes:8} {times}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="SUBSTRING", default="", help="labels with each of its words")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rounds < 1 or (given.threads is not None and given.threads < 1):
        parser.error("--rounds and --threads are at least 1")
    return given


def main() -> int:
    from clinattn.tools.other_work import disturbance

    given = arguments()
    if not clinattn.backends()["cpu"]:
        print(f"the compiled CPU kernels: {clinattn.backends()['cpu']}", file=sys.stderr)
        return 1
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.job:
        try:
            do_job(given.job)
        except KeyboardInterrupt:
            return 130
        return 0
    rows, failures, interrupted = measure_all(given.k, given.rounds, Console(stderr=True))
    console = Console(soft_wrap=True)
    facts = facts_of_this_process()
    console.print("{cpu}, {threads} threads, torch {torch}, {commit}, {date}".format(**facts))
    Console(width=max(console.width, TABLE_WIDTH)).print(table(rows))
    console.print(summary(rows))
    if note := disturbance([row.environment for row in rows]):
        console.print(f"* {note}")
    for failure in failures:
        console.print("[red]failed[/red]", failure)
    if given.json:
        write_json(given.json, content(rows, interrupted))
    return 130 if interrupted else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
