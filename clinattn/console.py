"""What every command talks through: the two streams, errors of one line, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

DEMO = Path("../shared/data/mimic-iv-demo-meds")
INTERRUPTED = 130  # what a shell reports for Ctrl-C

out = Console(width=None if sys.stdout.isatty() else 110)
err = Console(stderr=True)


@contextmanager
def clear_errors(extra: str = "bench") -> Iterator[None]:
    """Bad input, or a package that is missing, ends with a line and status 2, not a traceback.

    extra: of clinattn, which brings the packages.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        need = f"{error.name} is not installed: pip install 'clinattn[{extra}]'"
        err.print(f"error: {need}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (ValueError, NotImplementedError) as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on a terminal's stderr, one line for each stage elsewhere."""
    if not err.is_terminal:
        yield stage_lines()
        return
    columns = (TextColumn("{task.description:<48}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("")
        yield lambda message, done, total: bar.update(
            task, description=message, completed=done, total=total
        )


def stage_lines() -> Callable[[str, int, int], None]:
    """Prints what stands before the colon of a message, with the time, when it changes."""
    started, shown = time.perf_counter(), ""

    def show_stage(message: str, done: int, total: int) -> None:
        nonlocal shown
        stage = message.partition(":")[0]
        if stage != shown:
            shown = stage
            seconds = time.perf_counter() - started
            print(f"[{seconds:4.0f} s] {stage}", file=sys.stderr, flush=True)

    return show_stage
