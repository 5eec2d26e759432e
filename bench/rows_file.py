"""The file that the rows of a benchmark go to: checked before the work, and written whole.

clinattn is imported when it is called: a side of compare.py has that of another tree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def output_file(text: str) -> Path:
    """For argparse, which shows what is wrong with it."""
    from clinattn.files import require_writable

    try:
        require_writable(text, "FILE")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    from clinattn.files import write_text

    write_text(path, json.dumps(content, indent=1) + "\n")
