"""`clinattn train`: a run from its options to its last line."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clinattn.tools import console
from clinattn.tools.options import takes
from clinattn.training.settings import TrainingSettings

if TYPE_CHECKING:
    import torch

    from clinattn.training.ranks import Ranks


@takes(TrainingSettings, environment=True)
def train(given: dict[str, Any]) -> None:
    """Pretrain or fine-tune an encoder; Ctrl-C saves, and --resume goes on to the same bits."""
    import torch

    from clinattn.training.checkpoint import checkpoints
    from clinattn.training.ranks import FirstFailed, RanksLost, joined

    settings = TrainingSettings(**{"device": console.default_device()} | given)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        with joined(settings.device) as (ranks, device):
            status = _train(settings, ranks, device)
    except RanksLost as error:
        if error.first:
            found = checkpoints(Path(settings.output))
            on = f"--resume goes on from {found[-1].name}" if found else "there is no checkpoint"
            say(f"error: {error}: {on}", style="red")
        status = 1
    except FirstFailed:
        status = 2
    if status:
        raise typer.Exit(status)


say = partial(console.err.print, soft_wrap=True)


def _train(settings: TrainingSettings, ranks: Ranks, device: torch.device) -> int:
    """Runs to the end; returns the status of the process. Nothing of the run outlives it."""
    from clinattn.files.claims import claimed
    from clinattn.training.loop import Diverged, Trainer

    output = settings.output
    with ExitStack() as stack:
        if ranks.rank == 0:
            stack.enter_context(claimed(Path(output)))
        progress = stack.enter_context(console.progress_bar())
        try:
            trainer = Trainer(settings, ranks, device, progress, say)
            trainer.say(trainer.summary())
            ended_by = trainer.run()
        except Diverged as error:
            say(f"error: {error}", style="red")
            return 1
    if ended_by:
        trainer.say(f"interrupted: --resume goes on from step {trainer.step} in {output}")
        return 128 + ended_by
    trainer.say(f"wrote {output}/metrics.jsonl and checkpoints up to step {trainer.step}")
    return 0
