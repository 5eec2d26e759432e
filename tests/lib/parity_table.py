"""Parity of all architectures: rows of what was compared, and the table in docs/parity.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clinattn.files.disk import write_text
from clinattn.tools.model_report.architectures import Architecture
from clinattn.tools.model_report.example_inputs import Padding
from clinattn.tools.model_report.parity import Replace, compare

LENGTHS = (23, 14, 7)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("train", "eval")


@dataclass(frozen=True)
class Row:
    """A comparison. outputs, gradients: see Parity; gradients are compared in training alone."""

    architecture: str
    model: str
    dtype: str
    mode: str
    padding: str
    replaced: int
    attentions: int
    calls: int
    outputs: float
    gradients: float | None
    worst: str
    passed: bool


def compare_architecture(
    architecture: Architecture, dtype: str, mode: str, padding: Padding, replace: Replace
) -> Row:
    """Returns a row. replace gives a report whose `replaced` and `kept` list attention modules."""
    model = architecture.build(dtype=DTYPES[dtype])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        batch = architecture.batch(model.config, LENGTHS, padding)
    reports = []
    training = mode == "train"
    parity = compare(
        model,
        batch,
        lambda copied: reports.append(replace(copied)),
        training=training,
        gradients=training,
    )
    (report,) = reports
    replaced = len(report.replaced)
    expected = architecture.expected_calls(padding)
    called = parity.calls > 0 if expected is None else parity.calls == expected
    return Row(
        architecture.name,
        architecture.model,
        dtype,
        mode,
        padding,
        replaced,
        replaced + len(report.kept),
        parity.calls,
        parity.outputs,
        parity.gradients,
        parity.worst[0],
        parity.passed and called,
    )


def parity_rows(
    architecture: Architecture, replace: Replace, modes: Sequence[str] = MODES
) -> Iterator[Row]:
    """Yields the rows of every dtype, mode and padding."""
    for padding in architecture.paddings:
        for dtype in DTYPES:
            for mode in modes:
                yield compare_architecture(architecture, dtype, mode, padding, replace)


def write_rows(
    path: Path, rows: Iterable[Row], facts: Mapping[str, Any], left: Mapping[str, str]
) -> None:
    """Writes rows. facts: what the rows depend on, see clinattn.tools.environment.

    left: model types that were not compared, with the reasons.
    """
    result = {"environment": dict(facts), "left": dict(left), "rows": [asdict(x) for x in rows]}
    write_text(path, json.dumps(result, indent=1) + "\n")


def read_rows(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows, and the types that were not compared, as written by write_rows."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in result["rows"]], result.get("left", {})


def left_table(left: Mapping[str, str]) -> str:
    """Returns Markdown, a line a reason: how many model types, and which."""
    lines = ["| reason | number | model types |", "| --- | ---: | --- |"]
    for reason in dict.fromkeys(sorted(left.values())):
        names = [f"`{name}`" for name in left if left[name] == reason]
        lines.append(f"| {reason} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def parity_table(rows: Sequence[Row]) -> str:
    """Returns Markdown, a line an architecture: worst errors, as fractions of what is allowed."""
    kinds = [(kind, dtype) for dtype in DTYPES for kind in ("outputs", "gradients")]
    lines = [
        "| model type | class | replaced | "
        + " | ".join(f"{dtype} {kind}" for kind, dtype in kinds)
        + " | padding |",
        "| --- | --- | --- | " + "---: | " * len(kinds) + "--- |",
    ]
    for name in dict.fromkeys(row.architecture for row in rows):
        own = [row for row in rows if row.architecture == name]
        cells = [f"`{name}`", f"`{own[0].model}`", f"{own[0].replaced} of {own[0].attentions}"]
        cells += [_worst(own, kind, dtype) for kind, dtype in kinds]
        cells.append(", ".join(dict.fromkeys(row.padding for row in own)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _worst(rows: Iterable[Row], kind: str, dtype: str) -> str:
    shares = [getattr(row, kind) for row in rows if row.dtype == dtype]
    return f"{max((share for share in shares if share is not None), default=0):.2f}"
