"""The options of `clinattn train`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from clinattn.tools import console


def train(
    context: typer.Context,
    task: Annotated[
        str, typer.Option(help="mlm (masked tokens), clm (next tokens) or classify.")
    ] = "mlm",
    meds_dir: Annotated[
        Path | None,
        typer.Option(
            envvar=["MEDS_DIR", "CLINATTN_MEDS_DIR"],
            help="MEDS folder. (default: the demo beside the project if there)",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help=".csv or .jsonl instead: text, label and, optionally, subject_id."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="With --text: a tokenizer.json. (default: words)")
    ] = None,
    label_code: Annotated[
        str | None,
        typer.Option(help="Classes of a MEDS folder: does 'ICU_*' follow in the timeline?"),
    ] = None,
    cuts: Annotated[int, typer.Option(help="With --label-code: sequences of a timeline.")] = 1,
    held_out: Annotated[float, typer.Option(help="Share of patients never trained on.")] = 0.2,
    min_count: Annotated[int, typer.Option(help="Rarer codes or words are [UNK].")] = 2,
    max_vocab: Annotated[int | None, typer.Option(help="Tokens at most.")] = None,
    preset: Annotated[str, typer.Option(help="Encoder size.")] = "tiny",
    init: Annotated[
        Path | None, typer.Option(help="Start from the encoder of this checkpoint.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of a sequence.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Of a packed batch.")] = 4096,
    accumulate: Annotated[int, typer.Option(help="Batches of a step, all processes together.")] = 1,
    steps: Annotated[int, typer.Option()] = 300,
    lr: Annotated[float, typer.Option(help="At its peak.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.1,
    weight_decay: Annotated[float, typer.Option()] = 0.01,
    clip: Annotated[float, typer.Option(help="Gradient norm at most; 0: no limit.")] = 1.0,
    mask_share: Annotated[float, typer.Option(help="0.15 as BERT, 0.3 as ModernBERT.")] = 0.3,
    nsp: Annotated[
        bool, typer.Option("--nsp", help="With mlm: next-sentence prediction besides, as BERT.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 (autocast), float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="(default: cuda if there, else cpu)")] = None,
    threads: Annotated[int | None, typer.Option(help="(default: torch's)")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and metrics.")] = Path(
        "train/out"
    ),
    eval_every: Annotated[int, typer.Option(help="Steps.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps.")] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")
    ] = False,
) -> None:
    """Pretrain or fine-tune an encoder; Ctrl-C saves, and --resume goes on to the same bits."""
    given = context.get_parameter_source("meds_dir")
    on_command_line = given is not None and given.name == "COMMANDLINE"
    if text is not None and not on_command_line:
        meds_dir = None
    elif meds_dir is None and text is None and console.DEMO.is_dir():
        meds_dir = console.DEMO
    import torch

    from clinattn.training.loop import Diverged, Trainer
    from clinattn.training.output import claimed
    from clinattn.training.ranks import joined
    from clinattn.training.settings import Settings

    settings = Settings(
        task=task,
        meds_dir=meds_dir,
        text_file=text,
        tokenizer=tokenizer,
        label_code=label_code,
        cuts=cuts,
        held_out=held_out,
        min_count=min_count,
        max_vocab=max_vocab,
        preset=preset,
        init=init,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        steps=steps,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        mask_share=mask_share,
        nsp=nsp,
        dtype=dtype,
        device=device or console.default_device(),
        threads=threads,
        seed=seed,
        output=output,
        eval_every=eval_every,
        save_every=save_every,
        keep=keep,
        resume=resume,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    say = partial(console.err.print, soft_wrap=True)
    with ExitStack() as stack:
        ranks, rank_device = stack.enter_context(joined(settings.device))
        if ranks.rank == 0:
            stack.enter_context(claimed(output))
        progress = stack.enter_context(console.progress_bar())
        try:
            trainer = Trainer(settings, ranks, rank_device, progress, say)
            trainer.say(trainer.summary())
            ended_by = trainer.run()
        except Diverged as error:
            say(f"error: {error}", style="red")
            raise typer.Exit(1) from None
    if ended_by:
        trainer.say(f"interrupted: --resume goes on from step {trainer.step} in {output}")
        raise typer.Exit(128 + ended_by)
    trainer.say(f"wrote {output}/metrics.jsonl and checkpoints up to step {trainer.step}")
