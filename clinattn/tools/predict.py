"""`clinattn predict`: from its options to the files, with results kept on the way."""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated, Any

import typer

from clinattn.tools import console
from clinattn.tools.options import takes
from clinattn.tools.prediction.settings import PredictionSettings


@takes(PredictionSettings, words=False)
def predict(
    given: dict[str, Any],
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A step-*.pt of clinattn train, a run's folder, or a folder of transformers.",
        ),
    ],
) -> None:
    """Predicts for many patients or notes at once, into a parquet file in the form of MEDS.

    Ctrl-C keeps what is done, and --resume goes on from there, to the same file.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    settings = PredictionSettings(checkpoint, **{"device": console.default_device()} | given)
    import torch

    from clinattn.tools.prediction.job import read_job
    from clinattn.tools.prediction.predict import is_finished, require_start, run
    from clinattn.tools.prediction.printed import ending, notes

    require_start(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    say = partial(console.out.print, soft_wrap=True)
    with console.progress_bar() as progress:
        progress(f"read: {checkpoint}", 0, 1)
        job = read_job(settings, progress)
        for line in notes(job):
            console.err.print(line, soft_wrap=True)
        if is_finished(job, settings):
            say("nothing is left to do: " + " and ".join(map(str, settings.files.values())))
            return
        result = run(job, settings, progress)
    if result.signal:
        console.err.print(
            f"interrupted: --resume goes on from row {result.rows:,} of {len(job.rows):,}",
            style="yellow",
            soft_wrap=True,
        )
        raise typer.Exit(128 + result.signal)
    for line in ending(job, settings, result):
        say(line)
