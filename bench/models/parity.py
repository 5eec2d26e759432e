"""Models of transformers before and after replace_attention: outputs and gradients, no clock.

    python bench/models/parity.py                                       all, half a minute
    python bench/models/parity.py -k bert                               those whose name has it
    python bench/models/parity.py --json bench/results/parity-NAME.json keep the rows

Prints the table of docs/parity.md. Exit status 1 where one is off by more than is allowed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

from clinattn.integrations.replace import replace_attention
from clinattn.tools.environment import environment
from clinattn.tools.model_report.architectures import REPLACED, Architecture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from parity_table import Row, parity_rows, parity_table, write_rows

from rows_file import output_file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="SUBSTRING", default="", help="of model types")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    return given


def chosen(substring: str) -> list[Architecture]:
    """Architectures with the substring in their name that the installed transformers has."""
    return [x for x in REPLACED if substring in x.name and x.available()]


def failure(row: Row) -> str:
    what = f"{row.architecture}, {row.dtype}, {row.mode}, padding {row.padding}"
    return f"failed: {what}: {row.calls} calls, worst {row.worst}"


def main() -> int:
    given = arguments()
    transformers.logging.set_verbosity_error()
    stderr = Console(stderr=True)
    rows: list[Row] = []
    for architecture in track(chosen(given.k), "comparing", console=stderr, transient=True):
        rows += parity_rows(architecture, replace_attention)
    facts = environment(torch.device("cpu"))
    print("{cpu}, torch {torch}, transformers {transformers}, {commit}, {date}\n".format(**facts))
    print(parity_table(rows))
    if given.json:
        write_rows(given.json, rows, facts)
    failures = [row for row in rows if not row.passed]
    for row in failures:
        stderr.print(failure(row), style="red", highlight=False, soft_wrap=True)
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
