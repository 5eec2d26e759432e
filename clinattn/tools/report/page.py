"""A self-contained HTML page from results in JSON: no script, no font, nothing fetched."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clinattn.files.disk import parse_json, write_text
from clinattn.tools.report.baseline import NoBaseline, compare
from clinattn.tools.report.kinds import check_result, kind_of
from clinattn.tools.report.section import Record, Section
from clinattn.tools.report.sections import section
from clinattn.tools.report.templates import template
from clinattn.tools.report.words import words_in

EXPECTED = "expected the results.json of clinattn bench, or JSON of bench/"


class ReportError(ValueError):
    """A file that is no benchmark result; the message says what was given and expected."""


def load_result(path: str | Path, name: str = "results") -> Record:
    """Loads what `clinattn bench` or bench/ wrote. Raises ReportError for anything else.

    name: of the argument, for the message.
    """
    where = f"{name}={str(path)!r}"
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ReportError(f"{where} cannot be read ({error.strerror}): {EXPECTED}") from error
    return parse_result(text, where)


def parse_result(text: bytes, where: str) -> Record:
    """The result that a file holds. where: names the file in the message of a ReportError."""
    if not text.strip():
        raise ReportError(f"{where} is empty: {EXPECTED}")
    try:
        result = parse_json(text)
    except ValueError as error:
        raise ReportError(f"{where} cannot be read ({error}): {EXPECTED}") from error
    if isinstance(result, dict) and [] in (result.get("rows"), result.get("benchmarks")):
        raise ReportError(f"{where} has no rows: expected a run that measured something")
    kind = kind_of(result)
    if kind is None:
        raise ReportError(
            f"{where} is no benchmark result: expected a JSON object with schema 1, or rows of "
            "a benchmark in bench/cpu or bench/models, or of pytest-benchmark"
        )
    try:
        check_result(result, kind)
    except ValueError as error:
        raise ReportError(f"{where}: {error}") from None
    return result


def write_report(
    results: Record | Sequence[Record], path: str | Path, baseline: Record | None = None
) -> list[Section]:
    """Renders one result or several to an HTML file; returns the sections of the page.

    baseline: an earlier result, to compare with. Raises ReportError where none is of its kind.
    """
    given = [results] if isinstance(results, dict) else results
    sections = sections_of(given, baseline)
    write_text(path, page_of(sections, raw_of(given, baseline)))
    return sections


def sections_of(results: Sequence[Record], baseline: Record | None = None) -> list[Section]:
    """The sections of a page, comparisons first, each with a title of its own."""
    try:
        found = [] if baseline is None else compare(baseline, results)
    except NoBaseline as error:
        raise ReportError(f"baseline {error}") from None
    found += [section(result) for result in results]
    count: Counter[str] = Counter()
    for i, one in enumerate(found):
        count[one.title] += 1
        if count[one.title] > 1:
            found[i] = replace(one, title=f"{one.title} ({count[one.title]})")
    return found


def render(*results: Record, baseline: Record | None = None) -> str:
    return page_of(sections_of(results, baseline), raw_of(results, baseline))


def raw_of(results: Sequence[Record], baseline: Record | None) -> list[str]:
    """The data at the end of a page."""
    return [json.dumps(x, indent=1) for x in (*results, *([] if baseline is None else [baseline]))]


def page_of(sections: Sequence[Section], raw: Sequence[str]) -> str:
    return template("page.html.j2").render(
        date=max(str(one.facts.get("date", ""))[:10] for one in sections),
        sections=sections,
        words=words_in(text for one in sections for text in texts(one)),
        raw=raw,
    )


def texts(one: Section) -> Iterator[str]:
    """Yields the texts of a section in which a reader may meet a word that is to be explained."""
    yield from (one.title, one.conclusion, one.load, *one.warnings, *one.notes, *one.facts)
    for table in one.tables:
        yield from (table.title, table.note, *table.header)
        yield from (cell for row in table.rows for cell in row[: table.labels])
    for chart in one.charts:
        yield from (chart["title"], chart["axis"], chart.get("y_axis", ""))
