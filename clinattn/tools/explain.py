"""`clinattn explain`: from its options to the table, the page and the JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from clinattn.files.disk import require_writable, write_text
from clinattn.tools import console
from clinattn.tools.explanation.settings import METHODS, ExplainSettings
from clinattn.tools.options import takes

DEFAULTS = " and ".join(list(METHODS)[:2])


@takes(ExplainSettings, words=False)
def explain(
    given: dict[str, Any],
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Of clinattn train --task classify: a step-*.pt or the folder of a run. Or a "
            "folder of transformers.",
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A method; give it twice for two. Choices: {', '.join(METHODS)}. "
            f"(default: {DEFAULTS})",
            autocompletion=lambda: [(name, known.title) for name, known in METHODS.items()],
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Write an HTML page, mode 0600.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers, mode 0600.")
    ] = None,
) -> None:
    """Explains a prediction for one patient or note, by scores of events or words.

    Two methods stand side by side, and are tested: the strongest are taken away, and at random as
    many. The page has the data of the patient or the note.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    for path, name in ((output, "output"), (json_file, "json")):
        if path is not None:
            require_writable(path, name)
    settings = ExplainSettings(
        checkpoint,
        **{"device": console.default_device(), "methods": tuple(method or ())} | given,
    )
    import torch

    from clinattn.tools.explanation.explain import explained, read_case
    from clinattn.tools.explanation.printed import lines

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with console.progress_bar() as progress:
        progress(f"read: {checkpoint}", 0, 1)
        case = read_case(settings)
        record = explained(case, settings, progress)
    if output is not None:
        from clinattn.tools.explanation.page import write_page

        write_page(record, case, output)
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=1) + "\n", private=True)
    for line in lines(record):
        console.out.print(line, soft_wrap=isinstance(line, str))
    for warning in case.warnings:
        console.err.print(warning, style="yellow", soft_wrap=True)
    for path in (output, json_file):
        if path is not None:
            console.out.print(f"wrote {path}, which has the data of a person", soft_wrap=True)
