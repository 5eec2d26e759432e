"""Tokens/s and idle share of training by number of processes, beside what paper.py says of them.

    python bench/scaling/run.py --data meds:FOLDER                    1, 2 and 4 processes here
    python bench/scaling/run.py --data meds:FOLDER --json bench/results/scaling-NAME.json
    python bench/scaling/run.py --device cuda --preset clinicalbert --processes 1 2 4 8

One thread a process. The batches of a step are the same for every number of processes. Rows `as
drawn` have batches that are cut where the next sequence is too long, each rank taking the next one:
how idle ranks were before batches were filled and balanced.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from clinattn.tools.environment import cpu_count, environment
from clinattn.workloads.opening import parse_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from rows_file import output_file, write_json
from scaling.paper import Job, Machine, step

WORKER = Path(__file__).with_name("worker.py")


def measured(processes: int, balanced: bool, given: argparse.Namespace) -> dict[str, Any]:
    """The rows of steps of a group of processes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data": given.data, "preset": given.preset, "max_tokens": given.max_tokens,
            "batch_tokens": given.batch_tokens, "accumulate": given.accumulate,
            "steps": given.warm_up + given.steps, "device": given.device, "shard": given.shard,
            "output": f"{folder}/out",
        }  # fmt: skip
        order = {
            "settings": settings, "steps": given.steps, "warm_up": given.warm_up,
            "balanced": balanced, "output": f"{folder}/found.json",
        }  # fmt: skip
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, "--nproc-per-node", str(processes), str(WORKER), json.dumps(order)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(Path(f"{folder}/found.json").read_text())


def row_of(processes: int, balanced: bool, found: dict[str, Any]) -> dict[str, Any]:
    rates = [row["tokens_per_s"] for row in found["steps"]]
    q1, q2, q3 = quantiles(rates, n=4)
    idle = [row["idle_share"] for row in found["steps"]]
    return {
        "processes": processes,
        "batches": "balanced" if balanced else "as drawn",
        "weights": found["weights"],
        "tokens_a_step": mean(row["tokens"] for row in found["steps"]),
        "tokens_per_s": {"median": q2, "q1": q1, "q3": q3},
        "idle_share": None if None in idle else mean(idle),
        "gradients_s": found["sums"]["gradients_s"],
        "message_s": found["sums"]["message_s"],
    }


def predicted(row: dict[str, Any], alone: dict[str, Any], batch_tokens: int) -> float:
    """Tokens/s on paper: one process gives the rate, sums alone give the bandwidth."""
    p, weights, tokens = row["processes"], row["weights"], row["tokens_a_step"]
    rounds = max(2 * (p - 1), 1)
    spent = max(row["gradients_s"] - row["message_s"], 1e-9)
    job = Job(weights, 1.0, tokens, batch_tokens)
    machine = Machine(
        rate=alone["tokens_per_s"]["median"],
        within=rounds / p * 4 * weights / spent, between=float("inf"), node=p,
        latency=row["message_s"] / rounds, overlap=0.0, memory=float("inf"),
        processors=cpu_count(),
    )  # fmt: skip
    return tokens / step(job, machine, p).seconds


def shareable(data: str) -> str:
    """The kind of data, and of a profile its name, but no path."""
    return data if data.startswith("profile:") else parse_data(data).kind


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="profile:ehr_population", help="as of clinattn train")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--accumulate", type=int, default=4, help="batches of a step, all together")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    rows: list[dict[str, Any]] = []
    for processes in given.processes:
        for balanced in (False, True) if processes > 1 else (True,):
            row = row_of(processes, balanced, measured(processes, balanced, given))
            alone = rows[0] if rows else row
            if alone["processes"] == 1 and given.device == "cpu":
                row["predicted_tokens_per_s"] = predicted(row, alone, given.batch_tokens)
            rows.append(row)
    show(rows)
    if given.json:
        chosen = {k: v for k, v in vars(given).items() if k != "json"}
        chosen["data"] = shareable(given.data)
        write_json(given.json, {"environment": environment(), "settings": chosen, "rows": rows})


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("processes", "batches", "tokens/s", "on paper", "idle share")
    for row in rows:
        on_paper, idle = row.get("predicted_tokens_per_s"), row["idle_share"]
        table.add_row(
            str(row["processes"]),
            row["batches"],
            f"{row['tokens_per_s']['median']:,.0f}",
            "" if on_paper is None else f"{on_paper:,.0f}",
            "" if idle is None else f"{idle:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
