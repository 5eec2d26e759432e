"""`clinattn evaluate`: from its options to the table, the page and the JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clinattn.files.disk import require_writable, write_text
from clinattn.tools import console
from clinattn.tools.evaluation.settings import EvaluateSettings
from clinattn.tools.options import takes


@takes(EvaluateSettings, words=False)
def evaluate(
    given: dict[str, Any],
    predictions: Annotated[
        str,
        typer.Argument(
            metavar="PREDICTIONS.parquet",
            help="What clinattn predict writes, or any file by the MEDS evaluation schema.",
        ),
    ],
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN|CODE",
            help="Figures for each value of a column, or, with --data, for patients who had a code "
            "such as 'ICU_*' before and those who had not; repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Write an HTML page.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")
    ] = None,
) -> None:
    """Measure predictions: AUROC, AUPRC, Brier score and calibration, with intervals.

    Intervals are by patient, and figures by subgroup on demand. Files of several classes and of
    numbers have figures of their own.
    """
    for path, name in ((output, "output"), (json_file, "json")):
        if path is not None:
            require_writable(path, name)
    settings = EvaluateSettings(predictions, tuple(by or ()), **given)
    from clinattn.tools.evaluation.evaluate import evaluated, is_private
    from clinattn.tools.evaluation.printed import lines

    with console.progress_bar() as progress:
        record = evaluated(settings, progress)
    for line in lines(record):
        console.out.print(line, soft_wrap=isinstance(line, str))
    for warning in record["warnings"]:
        console.err.print(warning, style="yellow", soft_wrap=True)
    if output is not None:
        from clinattn.tools.evaluation.page import write_page

        write_page(record, output)
    if json_file is not None:
        text = json.dumps(record, indent=1, default=str) + "\n"
        write_text(json_file, text, private=is_private(record))
    whose = ", which has the data of a person" if is_private(record) else ""
    for path in (output, json_file):
        if path is not None:
            console.out.print(f"wrote {path}{whose}", soft_wrap=True)
