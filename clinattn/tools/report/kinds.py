"""The kind of benchmark that wrote a result, and whether it holds what that kind has."""

from __future__ import annotations

from typing import Any

from clinattn.files.shapes import ANYTHING, TEXT, Named, require
from clinattn.tools.report.shapes import (
    AGREEMENT,
    BESIDE,
    DISTURBED,
    EXTRAS,
    KINDS,
    KNOWN,
    LENGTH,
    QUARTILES,
    Record,
)

# Fields of a row that tell the kinds which have no name of their own.
TELLING = {
    "kernels": {"ours_s", "torch_s", "case"},
    "parity": {"architecture", "attentions", "passed"},
    "pretrained": {"workload", "largest_difference", "tokens_per_s"},
}


def kind_of(result: Any) -> str | None:
    """The kind of a result, a name in KINDS, by the fields it has; None for no known one."""
    if not isinstance(result, dict):
        return None
    if result.get("schema") == 1:
        return "encoder"
    if "benchmarks" in result and "machine_info" in result:
        return "suites"
    if result.get("kind") in ("compare", "against_transformers", "engines"):
        return result["kind"]
    rows = result.get("rows")
    if isinstance(rows, list) and rows and isinstance(rows[0], dict):
        return next((kind for kind, told in TELLING.items() if told <= rows[0].keys()), None)
    return None


def rows_in(result: Record) -> list[Record]:
    """The rows of a result of a known kind; those of pytest-benchmark are in extra_info."""
    if "benchmarks" in result:
        return [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    return result["rows"]


def check_result(result: Record, kind: str) -> None:
    """Raises ValueError that says where a result is not what its program writes."""
    require(result, KINDS[kind])
    if kind == "suites":
        for i, benchmark in enumerate(result["benchmarks"]):
            extra, where = benchmark["extra_info"], f"benchmarks[{i}].extra_info"
            if extra.get("kind") in ("attention", "encoder"):
                require(benchmark, Named({"group": TEXT}), f"benchmarks[{i}]")
            require(extra, EXTRAS.get(extra.get("kind"), ANYTHING), where)
            for length in extra["peak_bytes"] if extra.get("kind") == "memory" else ():
                require(length, LENGTH, f"{where}.peak_bytes")
    for i, row in enumerate(rows_in(result)):
        where = f"benchmarks[{i}].extra_info" if kind == "suites" else f"rows[{i}]"
        require(row, BESIDE, where)
        if row.get("other_cpus") is not None:
            require(row, KNOWN, where)
        if row.get("disturbed"):
            require(row, DISTURBED, where)
    if kind == "engines":
        for i, row in enumerate(result["rows"]):
            if row["tokens_per_s"] is not None:
                require(row, Named({"tokens_per_s": QUARTILES}), f"rows[{i}]")
    if kind == "encoder":
        if result.get("agreement"):
            require(result["agreement"], AGREEMENT, "agreement")
        if "workload" in result:
            histogram = result["workload"]["histogram"]
            if len(histogram["edges"]) != len(histogram["counts"]) + 1:
                raise ValueError("workload.histogram: expected an edge more than counts")
