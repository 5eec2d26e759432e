"""`clinattn train`: a run from its options to its last line."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import typer

from clinattn.tools import console
from clinattn.tools.options import takes
from clinattn.training.settings import TrainingSettings


@takes(TrainingSettings, environment=True)
def train(given: dict[str, Any]) -> None:
    """Pretrain or fine-tune an encoder; Ctrl-C saves, and --resume goes on to the same bits."""
    import torch

    from clinattn.files.claims import claimed
    from clinattn.training.loop import Diverged, Trainer
    from clinattn.training.ranks import joined

    settings = TrainingSettings(**{"device": console.default_device()} | given)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    say = partial(console.err.print, soft_wrap=True)
    with ExitStack() as stack:
        ranks, rank_device = stack.enter_context(joined(settings.device))
        if ranks.rank == 0:
            stack.enter_context(claimed(Path(settings.output)))
        progress = stack.enter_context(console.progress_bar())
        try:
            trainer = Trainer(settings, ranks, rank_device, progress, say)
            trainer.say(trainer.summary())
            ended_by = trainer.run()
        except Diverged as error:
            say(f"error: {error}", style="red")
            raise typer.Exit(1) from None
    output = settings.output
    if ended_by:
        trainer.say(f"interrupted: --resume goes on from step {trainer.step} in {output}")
        raise typer.Exit(128 + ended_by)
    trainer.say(f"wrote {output}/metrics.jsonl and checkpoints up to step {trainer.step}")
