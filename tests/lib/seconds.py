"""Seconds of tests by file, beside those of a run that is kept in tests/seconds.json."""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from places import TESTS

KEPT = TESTS / "seconds.json"
LEAST = 2.0  # files below it are one line together


def by_file(reports: Iterable) -> Counter[str]:
    """Seconds of set-up, call and tear-down of pytest's reports, summed by file."""
    found: Counter[str] = Counter()
    for report in reports:
        # a file that cannot be imported is reported without one
        seconds = getattr(report, "duration", 0.0)
        found[report.nodeid.split("::")[0].removeprefix("tests/")] += seconds
    return found


def table(seconds: dict[str, float]) -> str:
    """Lines of a table, the slowest file first; the kept run's seconds are of its own machine."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"seconds": {}, "machine": "none"}
    width = max(map(len, seconds), default=0)
    lines = [f"{'seconds by file':{width}} {'now':>8} {'kept':>8}   kept: {kept['machine']}"]
    short = 0.0
    for name, value in sorted(seconds.items(), key=lambda x: -x[1]):
        if value < LEAST:
            short += value
            continue
        before = f"{kept['seconds'][name]:8.1f}" if name in kept["seconds"] else ""
        lines.append(f"{name:{width}} {value:8.1f} {before}")
    lines.append(f"{f'files under {LEAST:.0f} s':{width}} {short:8.1f}")
    all_now, all_kept = sum(seconds.values()), sum(kept["seconds"].values())
    lines.append(f"{'all':{width}} {all_now:8.1f} {all_kept:8.1f}")
    return "\n".join(lines)


def keep(seconds: dict[str, float], path: Path = KEPT) -> None:
    """Write a run's seconds for later ones to stand beside."""
    machine = f"{_processor()}, {datetime.date.today().isoformat()}"
    rounded = {name: round(value, 1) for name, value in sorted(seconds.items())}
    path.write_text(json.dumps({"machine": machine, "seconds": rounded}, indent=1) + "\n")


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        return next(x.split(":")[1].strip() for x in info.splitlines() if "model name" in x)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
