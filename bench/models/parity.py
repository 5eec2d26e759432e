"""Models of transformers before and after replace_attention: outputs and gradients, no clock.

    python bench/models/parity.py              the types whose features were chosen by hand
    python bench/models/parity.py --all        every type that AutoModel knows, at a small size
    python bench/models/parity.py -k bert      those whose name has it
    python bench/models/parity.py --all --json bench/results/parity-NAME.json
                                               keep the rows, of which docs/parity.md is made

Prints the table of docs/parity.md, and with --all the types that were not compared, with reasons.
Exit status 1 where one is off by more than is allowed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import nn

from clinattn.integrations.replace import Replacement, replace_attention
from clinattn.tools.environment import environment
from clinattn.tools.model_report.architectures import REPLACED, Architecture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from parity_table import Row, left_table, parity_rows, parity_table, write_rows
from small_models import NotServed, model_types, small_architecture

from rows_file import output_file

LIMIT = 30  # seconds for a type
BROKEN, UNRUN = "fails once it is replaced", "does not run at this size, in fp64 or with padding"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="types of AutoModel, too")
    parser.add_argument("-k", metavar="SUBSTRING", default="", help="of model types")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    return given


def chosen(substring: str) -> list[Architecture]:
    """Architectures with the substring in their name that the installed transformers has."""
    return [x for x in REPLACED if substring in x.name and x.available()]


def others(substring: str) -> list[str]:
    """The other types that AutoModel knows."""
    known = {x.name.replace("-", "_") for x in REPLACED}
    return [x for x in model_types() if substring in x and x.replace("-", "_") not in known]


class Replacing:
    """replace_attention, which notes that a comparison got so far."""

    def __init__(self) -> None:
        self.done: Replacement | None = None

    def __call__(self, model: nn.Module) -> Replacement:
        self.done = replace_attention(model)
        return self.done


def tried(model_type: str) -> list[Row] | str:
    """Rows of a type at a small size, in training mode, or the reason why there are none."""
    replace = Replacing()
    rows: list[Row] = []
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(LIMIT)
    try:
        architecture = small_architecture(model_type)
        for row in parity_rows(architecture, replace, ("train",)):
            assert replace.done is not None
            if not replace.done.replaced:
                return of_its_own(replace.done)
            rows.append(row)
            replace.done = None
    except Exception as error:
        return why_not(error, replace.done is not None)
    finally:
        signal.alarm(0)
    return rows


def too_slow(*_: object) -> None:
    raise NotServed(f"takes more than {LIMIT} seconds at this size")


def of_its_own(replacement: Replacement) -> str:
    reasons = dict.fromkeys(x.reason.partition(": ")[2] or x.reason for x in replacement.kept)
    return "; ".join(reasons) or "has no attention"


def why_not(error: Exception, replaced: bool) -> str:
    """replaced: the error is not the model's own, at a size that it was not made for."""
    if isinstance(error, NotServed):
        return str(error)
    if isinstance(error, NotImplementedError) and replaced:
        return f"refused by clinattn: {str(error).partition(';')[0]}"
    return f"{BROKEN if replaced else UNRUN}: {type(error).__name__}"


def failure(row: Row) -> str:
    what = f"{row.architecture}, {row.dtype}, {row.mode}, padding {row.padding}"
    return f"failed: {what}: {row.calls} calls, worst {row.worst}"


def main() -> int:
    given = arguments()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="no attention was replaced")
    stderr = Console(stderr=True)
    progress = lambda x: track(x, "comparing", console=stderr, transient=True)
    rows: list[Row] = []
    left: dict[str, str] = {}
    for architecture in progress(chosen(given.k)):
        rows += parity_rows(architecture, replace_attention)
    for model_type in progress(others(given.k) if given.all else []):
        found = tried(model_type)
        if isinstance(found, str):
            left[model_type] = found
        else:
            rows += found
    facts = environment(torch.device("cpu"))
    print("{cpu}, torch {torch}, transformers {transformers}, {commit}, {date}\n".format(**facts))
    print(parity_table(rows))
    if left:
        print(f"\n{left_table(left)}")
    if given.json:
        write_rows(given.json, rows, facts, left)
    failures = [row for row in rows if not row.passed]
    for row in failures:
        stderr.print(failure(row), style="red", highlight=False, soft_wrap=True)
    broken = any(reason.startswith(BROKEN) for reason in left.values())
    return 1 if failures or broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
