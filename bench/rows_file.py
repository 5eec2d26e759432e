"""The file that the rows of a benchmark go to: checked before the work, and written whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clinattn.files.disk import require_writable, write_text


def output_file(text: str) -> Path:
    """Returns the path of a file that can be written; raises the error that argparse shows."""
    try:
        require_writable(text, "FILE")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
