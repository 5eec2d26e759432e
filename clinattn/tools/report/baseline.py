"""An earlier run beside a later one of the same kind: each case then, now, and the ratio."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import geometric_mean

from clinattn.tools.report.kinds import kind_of
from clinattn.tools.report.section import (
    SPEEDS,
    UNITS,
    Case,
    Record,
    Section,
    Table,
    short,
    times,
)
from clinattn.tools.report.sections import VIEWS

SAME = 0.05  # of a ratio: neighbouring runs of one program differ by as much
NOT_COMPARED = ("date", "clinattn", "commit", "load average at the start")


class NoBaseline(ValueError):
    """An earlier result that has no case in common with the later ones."""


def compare(then: Record, results: Sequence[Record]) -> list[Section]:
    """A section for each result of the kind of the earlier one. Raises NoBaseline."""
    kind = kind_of(then)
    assert kind is not None
    alike = [result for result in results if kind_of(result) == kind]
    if not alike:
        kinds = ", ".join(sorted({str(kind_of(result)) for result in results}))
        raise NoBaseline(f"holds rows of the kind {kind}: expected {kinds}, as results have")
    return [section(then, now, kind) for now in alike]


def section(then: Record, now: Record, kind: str) -> Section:
    view = VIEWS[kind]
    before, after = ({(c.key, c.unit): c for c in view.cases(x)} for x in (then, now))
    common = [(before[key], case) for key, case in after.items() if key in before]
    if not common:
        raise NoBaseline("has no case in common with results: expected the same cases")
    facts = view.facts(then), view.facts(now)
    dates = [str(own.get("date", "an unknown day"))[:10] for own in facts]
    versions = [f"clinattn {own.get('commit') or own.get('clinattn', '?')}" for own in facts]
    return Section(
        title=f"Then and now: {view.section(now).title}",
        conclusion=conclusion(common, dates[0]),
        facts={"then": f"{dates[0]}, {versions[0]}", "now": f"{dates[1]}, {versions[1]}"},
        warnings=differences(facts[0], facts[1], "programs or machine")
        + differences(view.settings(then), view.settings(now), "work"),
        tables=[
            table(unit, [pair for pair in common if pair[1].unit == unit])
            for unit in dict.fromkeys(case.unit for _, case in common)
        ],
        notes=[
            f"The same: within {SAME:.0%}, or with quartiles that meet, where a case has them. "
            "A star marks other work beside a measurement.",
            *alone("then", before.keys() - after.keys()),
            *alone("now", after.keys() - before.keys()),
        ],
        backing=[machines(*facts)],
    )


def machines(then: Record, now: Record) -> Table:
    """The facts of both runs, side by side."""
    rows = [
        (name, *("-" if name not in own else short(own[name]) for own in (then, now)))
        for name in then | now
    ]
    return Table("Programs and machine", ("fact", "then", "now"), rows, labels=3)


def ratio(then: Case, now: Case) -> float:
    """Returns the ratio of now over then, or of then over now where less is better."""
    over, under = (now, then) if UNITS[now.unit].rate else (then, now)
    return over.value / under.value if under.value else math.inf


def verdict(then: Case, now: Case) -> str:
    """"the same", or "more" or "less" of what the ratio counts."""
    found = ratio(then, now)
    meet = (
        None not in (then.low, then.high, now.low, now.high)
        and then.low <= now.high  # type: ignore[operator]
        and now.low <= then.high  # type: ignore[operator]
    )
    if meet or 1 - SAME <= found <= 1 + SAME:
        return "the same"
    return "more" if found > 1 else "less"


def conclusion(common: Sequence[tuple[Case, Case]], date: str) -> str:
    """Counts the faster, slower and unchanged cases; without speeds, those of memory or errors."""
    speeds = [pair for pair in common if pair[1].unit in SPEEDS]
    own = speeds or list(common)
    unit = UNITS[own[0][1].unit].ratio
    words = ("faster", "slower") if speeds else ("higher", "lower")
    count = Counter(verdict(*pair) for pair in own)
    ratios = [x for pair in own if 0 < (x := ratio(*pair)) < math.inf]
    mean = f"; the geometric mean is {times(geometric_mean(ratios))}" if ratios else ""
    mean += unit.removeprefix("times") if ratios else ""
    return (
        f"Since {date}, of {len(own)} cases: {count['more']} {words[0]}, {count['less']} "
        f"{words[1]}, {count['the same']} the same{mean}."
    )


def table(unit: str, pairs: Sequence[tuple[Case, Case]]) -> Table:
    head = (f"{when}, {unit}" for when in ("then", "now"))
    return Table(
        UNITS[unit].title,
        ("case", *head, UNITS[unit].ratio, "difference"),
        [
            (
                ", ".join(now.key),
                *(shown(case) for case in (then, now)),
                f"{ratio(then, now):.2f}",
                named(unit, verdict(then, now)),
            )
            for then, now in pairs
        ],
    )


def named(unit: str, found: str) -> str:
    if unit not in SPEEDS:
        return found
    return {"more": "faster", "less": "slower"}.get(found, found)


def shown(case: Case) -> str:
    """The value with as many digits as tell, and a star for other work."""
    digits = 0 if case.value >= 100 else 2 if case.value >= 1 else 4
    return f"{case.value:,.{digits}f}" + "*" * case.disturbed


def differences(then: Record, now: Record, of: str) -> list[str]:
    """A sentence on the facts that differ, which a ratio may be due to."""
    names = [name for name in (then | now) if name not in NOT_COMPARED]
    told = [name for name in names if (name in then and name in now) or name == "gpu"]
    found = [
        f"{name} was {then.get(name, 'none')} and is {now.get(name, 'none')}"
        for name in told
        if then.get(name) != now.get(name) and not name.startswith("peak")
    ]
    if not found:
        return []
    return [f"Not the same {of}, so the ratios are not of clinattn alone: {'; '.join(found)}."]


def alone(when: str, keys: set[tuple[tuple[str, ...], str]]) -> list[str]:
    """A sentence on the cases that only one of both has."""
    names = sorted({", ".join(key) for key, _ in keys})
    return [f"Only {when}: {'; '.join(names)}."] if names else []
