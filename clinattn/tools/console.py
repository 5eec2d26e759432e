"""Output of every command: the two streams, errors of one line, progress."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

DEMO = Path("../shared/data/mimic-iv-demo-meds")
INTERRUPTED = 130  # what a shell reports for Ctrl-C
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Names, paths and messages are shown as they are: [red] or :tada: in them is text.
_plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed
out = Console(width=None if _terminal else 110, **_plain)
err = Console(stderr=True, **_plain)


@contextmanager
def one_line_errors(extra: Callable[[], str] = lambda: "bench") -> Iterator[None]:
    """The boundary of every command: what is wrong outside the program ends in a line, status 2.

    That is: bad input, a file or its contents, a full disk, a package that is missing. Ctrl-C has
    a line too. extra: of clinattn, which brings the packages.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install 'clinattn[{extra()}]'")
    except BrokenPipeError:  # a reader that has seen enough, such as head
        _drop_stdout()
        raise SystemExit(1) from None
    except OSError as error:
        _drop_stdout()
        # files of ours are always named
        where = error.filename or ("standard output" if error.errno in FULL else None)
        _fail((f"{where}: " if where else "") + (error.strerror or str(error)))
    except (ValueError, NotImplementedError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        err.print("interrupted", style="yellow")
        raise SystemExit(INTERRUPTED) from None


def _fail(message: str) -> NoReturn:
    """Prints the message as one line of stderr, and exits with status 2."""
    err.print("error: " + " ".join(message.split()), style="red", soft_wrap=True)
    raise SystemExit(2) from None


def _drop_stdout() -> None:
    """Leaves nothing to the interpreter's last flush, which would complain once more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on a terminal's stderr, one line for each stage elsewhere."""
    if not err.is_terminal:
        yield stage_lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<48}", markup=False), BarColumn(), TimeElapsedColumn())
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
