"""The class Run: it keeps the rows of a run of run.py and the time that is left for it."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clinattn

BUDGET = float(os.environ.get("CLINATTN_GPU_BUDGET", "840"))  # seconds of the whole run
PRINTED = 15  # failures of a stage that are printed; all of them are rows


class Run:
    """Rows, written one by one, and the time that is left for the stage that runs.

    asked: the backends of ours that the run is about. backends: those of them that stages can call.
    """

    def __init__(
        self, path: Path, asked: list[str], facts: dict[str, Any], device: torch.device
    ) -> None:
        self.device, self.dryrun, self.asked = device, device.type == "cpu", asked
        self.facts, self.stage = facts, ""
        self.until = end_of_run()
        self.printed: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a")
        usable, broken = clinattn.backends(), self.broken()
        self.backends = [name for name in asked if usable[name] and name not in broken]

    def row(self, **fields: Any) -> None:
        fields = {"stage": self.stage, **fields}
        self.file.write(json.dumps(fields | self.facts) + "\n")
        self.file.flush()
        if fields.get("ok") is False:
            self.printed[self.stage] += 1
            if self.printed[self.stage] > PRINTED:
                return
        print("  ".join(f"{k}={shown(v)}" for k, v in fields.items() if k != "trace"), flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows that were written so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def rows_from(self, offset: int) -> list[dict[str, Any]]:
        """Returns the rows that begin at a byte of the file."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return [json.loads(line) for line in file.read().splitlines()]

    def broken(self) -> set[str]:
        """Backends that could not be built, or whose first call failed."""
        return {x["backend"] for x in self.rows() if x["stage"] == "build" and x.get("ok") is False}

    def begin(self, stage: str, seconds: float) -> None:
        """Begins a stage: later rows carry its name, and it has at most `seconds`."""
        self.stage, self.until = stage, min(end_of_run(), time.time() + seconds)

    def left(self) -> float:
        """Returns the seconds that the present stage still has."""
        return self.until - time.time()

    def enough_time(self, seconds: float, what: str) -> bool:
        """Returns whether `seconds` are left; else a row says that `what` was left out."""
        if self.left() >= seconds or self.dryrun:
            return True
        self.row(skipped=what, needs_s=seconds, left_s=round(self.left()))
        return False


def end_of_run() -> float:
    started = float(os.environ.setdefault("CLINATTN_GPU_STARTED", str(time.time())))
    return started + BUDGET


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def outcome(check: Callable[[], Any]) -> dict[str, Any]:
    """Returns the fields of a row: ok, or the error that the check raised."""
    try:
        check()
        return {"ok": True}
    except Exception as error:
        return {"ok": False, "error": str(error)[:300], "trace": traceback.format_exc()[-1500:]}
