"""The record of a section of the page, which is on one file of results, and formats of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from clinattn.tools.other_work import disturbance, load

MEBIBYTE = 1 << 20

FACTS = {
    **{x: x for x in ("date", "clinattn", "commit", "python", "torch", "triton", "transformers")},
    **{x: x for x in ("openvino", "onnxruntime", "platform", "cpu", "gpu", "cpus", "threads")},
    "instruction_set": "instruction set",
    "matmul_precision": "matmul precision",
    "load_average": "load average at the start",
    "peak_fp32_gflop_per_s": "peak fp32, GFLOP/s",
    "peak_bf16_gflop_per_s": "peak bf16, GFLOP/s",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """labels: so many columns in front are texts; a row is named by the first."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    labels: int = 1
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A number to be seen from afar, and what it is of."""

    value: str
    text: str


@dataclass(frozen=True)
class Section:
    """Section on one file of results.

    conclusion: a sentence. facts: hardware, versions, date, commit. load: what else the machine
    did. warnings: what makes the numbers doubtful. notes: how they were measured. backing: tables
    that come last, before that of the facts.
    """

    title: str
    conclusion: str
    facts: Record
    load: str = ""
    warnings: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    charts: Sequence[Record] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    backing: Sequence[Table] = ()

    @property
    def origin(self) -> str:
        """The day, the programs and the machine, in a line."""
        named = ("date", "clinattn", "commit", "torch", "gpu", "cpu", "threads", "then", "now")
        said = {"clinattn": "clinattn {}", "torch": "torch {}", "threads": "{} threads"}
        said |= {"commit": "commit {}", "then": "then: {}", "now": "now: {}"}
        shown = self.facts | {"date": str(self.facts.get("date", ""))[:10]}
        found = [(name, shown[name]) for name in named if shown.get(name)]
        said |= {"threads": "{} thread"} if shown.get("threads") == 1 else {}
        return "; ".join(said.get(name, "{}").format(value) for name, value in found)

    @property
    def last_tables(self) -> list[Table]:
        """The backing tables, and that of the facts; a comparison has its facts in its own."""
        rows = [(name, short(value)) for name, value in self.facts.items()]
        facts = Table("Environment", ("fact", "value"), rows, labels=2)
        return [*self.backing, *([] if "then" in self.facts else [facts])]


@dataclass(frozen=True)
class Case:
    """A number that a later run has too. low, high: its quartiles, where they are known.

    key: the texts that name it. unit: a name in UNITS.
    """

    key: tuple[str, ...]
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    disturbed: bool = False


@dataclass(frozen=True)
class Unit:
    """title: of a table. ratio: the head of its ratios; they are of now over then if `rate`."""

    title: str
    ratio: str
    rate: bool


UNITS = {
    "tokens/s": Unit("Speed, in tokens/s", "times as fast", True),
    "GFLOP/s": Unit("Speed, in GFLOP/s", "times as fast", True),
    "ms": Unit("Time, in ms", "times as fast", False),
    "MiB": Unit("Peak memory, in MiB", "times the memory", True),
    "of the error allowed": Unit("Largest errors", "times the error", True),
}
SPEEDS = tuple(name for name, unit in UNITS.items() if unit.ratio == "times as fast")


def facts_in(record: Record) -> Record:
    """The facts of a row that say where a number comes from, under the names of the page."""
    return {shown: record[name] for name, shown in FACTS.items() if record.get(name) is not None}


def of_environment(result: Record) -> Record:
    """The facts of a result that keeps them apart from its rows."""
    return facts_in(result["environment"])


@dataclass(frozen=True)
class View:
    """Functions of a result that show and compare its kind."""

    section: Callable[[Record], Section]
    cases: Callable[[Record], list[Case]]
    facts: Callable[[Record], Record] = of_environment
    settings: Callable[[Record], Record] = lambda result: {}


def load_in(rows: Sequence[Record]) -> str:
    """A sentence on what else the machine did meanwhile."""
    return load(rows) or "These rows do not say what else ran on the machine."


def doubts(rows: Sequence[Record], interrupted: bool = False) -> list[str]:
    """Sentences that warn of rows that are missing, or slowed down by other work."""
    found = ["The run was interrupted: these are partial results."] if interrupted else []
    note = disturbance(rows)
    return found + ([f"* {note}."] if note else [])


def marked(text: str, row: Record) -> str:
    """The text, with a star where other work ran beside the measurement."""
    return text + "*" * bool(row.get("disturbed"))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def scaled(value: float | None, scale: float, digits: int = 0) -> str:
    return "-" if value is None else f"{scale * value:,.{digits}f}"


def quartiles(rate: Record) -> str:
    return f"{rate['q1']:,.0f} to {rate['q3']:,.0f}"


def of_rate(key: tuple[str, ...], rate: Record, row: Record) -> Case:
    """A case in tokens/s."""
    q1, q3 = rate["q1"], rate["q3"]
    return Case(key, "tokens/s", rate["median"], q1, q3, bool(row.get("disturbed")))


def set_against(
    subject: str, ratios: Sequence[tuple[str, float]], rival: str, addition: str = ""
) -> str:
    """Says how many times as fast a subject is as a rival: mean, slowest and fastest case.

    ratios: with the names of their cases.
    """
    found = [(name, ratio) for name, ratio in ratios if 0 < ratio < math.inf]
    if not found:
        return "No case has a ratio."
    (least, low), (most, high) = (pick(found, key=lambda x: x[1]) for pick in (min, max))
    subject, rival = closed(subject), closed(rival)
    if len(found) == 1:
        return f"{subject} is {times(low)} as fast as {rival} ({least}){addition}."
    mean = geometric_mean([ratio for _, ratio in found])
    return (
        f"{subject} is {times(mean)} as fast as {rival} in the geometric mean of {len(found)} "
        f"cases, from {times(low)} ({least}) to {times(high)} ({most}){addition}."
    )


def short(value: Any) -> str:
    """A value as a reader wants it: three digits of an error, thousands apart, yes and no."""
    if value is None:
        return "not available"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def closed(name: str) -> str:
    """A name that stands in a sentence: one with a comma ends with another."""
    return f"{name}," if "," in name else name


def times(ratio: float) -> str:
    return f"{ratio:.2f} times"
