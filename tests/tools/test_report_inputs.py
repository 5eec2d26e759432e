"""Whatever a file of results holds: a page, or a line that says where it errs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser

import pytest
from places import ROOT
from results import ENCODER, RESULTS

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from clinattn.tools.report.page import (  # noqa: E402
    ReportError,
    load_result,
    parse_result,
    render,
    sections_of,
    texts,
    write_report,
)
from clinattn.tools.report.plots import write_plots  # noqa: E402
from clinattn.tools.report.templates import template  # noqa: E402

KINDS = RESULTS | {"encoder": ENCODER}
HOSTILE = (
    "a);filter:url(//x.y);--z:(\"'><script src=//x.y>alert(1)</script><img src=x onerror=alert(1)>"
    "{{ 7 * 7 }}{% raw %}]]>--></style></svg></pre>&#x3c;$\\frac{[red]\x00\x1b]0;x\x07\ud800"
)
VALUES = [None, True, -1, 10**400, math.nan, math.inf, "", "9", HOSTILE, [], [None], {}]


class Structure(HTMLParser):
    """Tags, names of attributes, and the styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.styles: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.styles |= {value for name, value in attrs if name == "style"}


def structure(html: str) -> Structure:
    found = Structure()
    found.feed(html)
    return found


@cache
def plain(kind: str) -> Structure:
    return structure(render(KINDS[kind], baseline=KINDS[kind]))


def places(value, path=()) -> Iterator[tuple]:
    """The path to every value within."""
    if isinstance(value, (dict, list)):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield (*path, name)
            yield from places(value[name], (*path, name))


def holder_of(result, path):
    """A copy, and the dict or list within that holds the value."""
    changed = holder = json.loads(json.dumps(result))
    for name in path[:-1]:
        holder = holder[name]
    return changed, holder


def with_value(result, path, value):
    changed, holder = holder_of(result, path)
    holder[path[-1]] = value
    return changed


def without(result, path):
    changed, holder = holder_of(result, path)
    del holder[path[-1]]
    return changed


def assert_harmless(html: str, kind: str) -> None:
    """No tag, no attribute and no style but those of the template."""
    found = structure(html)
    assert found.tags <= plain(kind).tags and found.names <= plain(kind).names
    colors = set(re.findall(r"(--\w+):", html[: html.index("</style>")]))
    for style in found.styles:
        (name,) = re.fullmatch(r"(?:fill|stroke|color): var\((--\w+)\)", style).groups()
        assert name in colors


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_anywhere_is_shown_or_named(kind):
    shown = 0
    for place in places(KINDS[kind]):
        for changed in (
            without(KINDS[kind], place),
            *(with_value(KINDS[kind], place, value) for value in VALUES),
        ):
            text = json.dumps(changed)
            try:
                result = parse_result(text.encode(), "results='x.json'")
            except ReportError as error:
                message = str(error)
                assert "x.json'" in message and "\n" not in message and message.isprintable()
                continue
            shown += 1
            for then, now in ((result, KINDS[kind]), (KINDS[kind], result)):
                try:
                    found = sections_of([now], then)
                except ReportError as error:
                    assert "has no case in common" in str(error)
                    found = sections_of([now])
                assert all(isinstance(text, str) for one in found for text in texts(one))
            if "filter:url" in text:
                assert_harmless(render(result), kind)
    assert shown


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_may_be_hostile(kind, tmp_path):
    def spoil(value, name=""):
        if isinstance(value, dict):
            spoiled = {key: spoil(own, key) for key, own in value.items()}
            return spoiled | ({HOSTILE: HOSTILE} if name in ("environment", "settings") else {})
        if isinstance(value, list):
            return [spoil(own) for own in value]
        named = name in ("kind", "case")  # what decides on which page it is
        return value + HOSTILE if isinstance(value, str) and not named else value

    path = tmp_path / "x.json"
    path.write_text(json.dumps(spoil(KINDS[kind])))
    spoiled = load_result(path)
    write_report(spoiled, tmp_path / "x.html", baseline=spoiled)
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert_harmless(html, kind)
    assert "&lt;script src=" in html and "<script" not in html and "{{ 7 * 7 }}" in html


def test_no_value_of_a_file_is_trusted():
    """Autoescaping is on, and nothing is marked as safe."""
    assert template("page.html.j2").environment.autoescape is True
    templates = list((ROOT / "clinattn" / "tools" / "report").glob("*.j2"))
    assert len(templates) == 4
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|autoescape|Markup", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1}', "interrupted is missing"),
        (json.dumps(without(ENCODER, ("environment", "date"))), "environment.date is missing"),
        (
            json.dumps(with_value(ENCODER, ("rows", 1, "tokens_per_s", "median"), None)),
            r"rows\[1\].tokens_per_s.median is null: expected a number above 0",
        ),
        ("[" * 100_000, "cannot be read .nested deeper than 64 levels"),
        ('{"schema": 1, "x": ' + "[" * 500 + "]" * 500 + "}", "nested deeper than 64 levels"),
        ("9" * 10_000, "cannot be read .Exceeds the limit"),
        ("", "x.json' is empty: expected the results.json of clinattn bench"),
        (" \n\t ", "x.json' is empty: expected"),
        ('{"schema": 1', "cannot be read .Expecting"),
        ("\x89PNG", "cannot be read .Expecting value"),
        ("null", "is no benchmark result"),
        ('{"rows": [7]}', "is no benchmark result"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=message):
        load_result(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc", "{}".encode("utf-16")])
def test_other_encodings_are_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ReportError, match="x.json' (cannot be read|is no benchmark result)"):
        load_result(tmp_path / "x.json")


def test_names_of_folders_are_no_formulas(tmp_path):
    """matplotlib takes what stands between two dollars for mathematics."""
    changed = with_value(ENCODER, ("workload", "source"), "MEDS folder $\\frac{$ <b>")
    for row in changed["rows"]:
        row |= {"preset": "$x$", "dtype": "float32", "max_tokens": 9, "workload": "$^$"}
    paths = write_plots(changed, tmp_path)
    assert all(path.stat().st_size for path in paths) and len(paths) == 8
