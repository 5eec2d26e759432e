"""`clinattn export`: from its options to the folder and the program."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from clinattn.tools import console
from clinattn.tools.exporting.settings import ExportSettings
from clinattn.tools.options import takes


@takes(ExportSettings)
def export(
    given: dict[str, Any],
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A step-*.pt of clinattn train, the folder of a run, or, with --torch-export "
            "alone, a folder of transformers.",
        ),
    ],
) -> None:
    """Makes of a trained model a folder that transformers loads, and a program of torch.export.

    The folder has a model card. It has no patient's record, but codes and weights that are
    aggregates of the training data.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    settings = ExportSettings(checkpoint, **given)
    from clinattn.tools.exporting.export import export as run

    with console.progress_bar() as progress:
        lines = list(run(settings, progress))
    for line in lines:
        console.out.print(line, soft_wrap=True)
