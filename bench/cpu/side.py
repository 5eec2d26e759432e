"""Process of one side of compare.py: loads one tree's clinattn, and times calls on demand.

Orders come on stdin and answers go to stdout, a JSON object a line:

    {"list": WORDS}                        -> [[entry, dtype, pass], ...] with these words
    {"prepare": [entry, dtype, pass]}      -> {"ways": [name, ...]}, or {"error": why}
    {"time": name}                         -> {"seconds": s, "process": s}, one call of that way
    {"facts": null}                        -> what the numbers depend on
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import clinattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the packages
from cpu.cases import ENTRIES, chosen
from cpu.measure import CHECKED_HEADS, CPU, DTYPES, Work, facts_of_this_process, work_of
from suites.problem import check, cotangent, inputs

# A process whose instruction set is forced would be another one.
HERE = tuple(entry for entry in ENTRIES if entry.isa is None)


class Side:
    """The works of one measurement, ready to be timed."""

    def __init__(self) -> None:
        self.works: dict[str, Work] = {}

    def list(self, words: str) -> list[tuple[str, str, str]]:
        return [
            (entry.name, dtype, one)
            for entry, dtype, passes in chosen(HERE, words)
            for one in passes
        ]

    def prepare(self, measurement: list[str]) -> dict[str, Any]:
        """Sets up the works of a measurement, checked against fp64: a wrong result is not timed."""
        name, dtype, passes = measurement
        self.works.clear()
        entry = next(entry for entry in HERE if entry.name == name)
        try:
            check(entry.case, DTYPES[dtype], CPU, list(entry.ways.values()), CHECKED_HEADS)
        except AssertionError as error:
            return {"error": f"{error} is further from fp64 than allowed"}
        except (TypeError, ValueError, NotImplementedError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        qkv = inputs(entry.case, DTYPES[dtype], CPU)
        d_out = cotangent(qkv[0])
        self.works = {
            way: work_of(make(entry.case, qkv), passes, d_out) for way, make in entry.ways.items()
        }
        return {"ways": list(self.works)}

    def time(self, way: str) -> dict[str, float]:
        work = self.works[way]
        began, process = time.perf_counter(), time.process_time()
        work()
        return {
            "seconds": time.perf_counter() - began,
            "process": time.process_time() - process,
        }

    def facts(self, _: None) -> dict[str, Any]:
        usable = clinattn.backends()["cpu"]
        return facts_of_this_process() | {
            "tree": str(Path(clinattn.__file__).parents[1]),
            "against": None if usable else "; ".join(usable.reasons),
        }


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    side = Side()
    for line in sys.stdin:
        ((order, argument),) = json.loads(line).items()
        print(json.dumps(getattr(side, order)(argument)), flush=True)


if __name__ == "__main__":
    main()
