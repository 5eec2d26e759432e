"""HTML pages read as a browser and as a reader with a screen reader or a keyboard meets them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser

from clinattn.tools.evaluation.words import EFRON, FIGURES
from clinattn.tools.report.words import WORDS

LEFT_TO_CLICK = {word.link[1] for word in WORDS if word.link}
LEFT_TO_CLICK |= {link for figure in FIGURES.values() for _, link in (*figure.sources, EFRON)}
SHUT = {"br", "meta"}  # tags without an end


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, *tags: str) -> list[Element]:
        """Returns the descendants of the element with one of the tags, in order."""
        found = []
        for child in self.children:
            found += [child] if child.tag in tags or not tags else []
            found += child.all(*tags)
        return found

    def has_class(self, name: str) -> bool:
        return name in self.attributes.get("class", "").split()


class Reader(HTMLParser):
    """Builds the tree; a tag that is not closed, or closed twice, is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {})

    def handle_starttag(self, tag, attrs):
        made = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(made)
        if tag not in SHUT:
            self.at = made

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        above = self.at
        while above is not None:
            above.text += data
            above = above.parent


def read(html: str) -> Element:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.at is reader.root, f"<{reader.at.tag}> is left open"
    return reader.root


def assert_self_contained(html: str) -> None:
    """A browser fetches nothing, and links lead to the page itself or to what WORDS names."""
    page = read(html)
    assert not page.all("script", "link", "iframe", "img", "object", "embed", "form", "base")
    ids = {x.attributes["id"] for x in page.all() if "id" in x.attributes}
    rest = html
    for element in page.all():
        assert not {"src", "srcset", "data", "action", "xlink:href"} & element.attributes.keys()
        if (href := element.attributes.get("href")) is not None:
            assert element.tag == "a", element
            assert href.removeprefix("#") in ids or href in LEFT_TO_CLICK, href
            rest = rest.replace(f'href="{href}"', "")
    assert not re.search(r"(https?:)?//\w|url\(|@import", rest)
    assert '<meta name="viewport"' in html and "@media print" in html


def barriers(html: str) -> list[str]:
    """Returns obstacles for a reader who does not see the page, or has no mouse."""
    page = read(html)
    return [
        *_of_the_document(page),
        *_of_headings(page),
        *_of_names(page),
        *(line for table in page.all("table") for line in _of_a_table(table)),
        *(line for svg in page.all("svg") for line in _of_a_drawing(svg, page)),
    ]


def name_of(element: Element, page: Element) -> str:
    """The name that a screen reader says: its label, or the texts that label it."""
    by_id = {x.attributes["id"]: x for x in page.all() if "id" in x.attributes}
    labels = element.attributes.get("aria-labelledby", "").split()
    return " ".join(by_id[x].text.strip() for x in labels if x in by_id) or element.attributes.get(
        "aria-label", ""
    )


def _of_the_document(page: Element) -> list[str]:
    found = []
    if [x.attributes.get("lang") for x in page.all("html")] != ["en"]:
        found.append("no lang")
    if not any(x.text.strip() for x in page.all("title")):
        found.append("no title")
    for tag in ("header", "nav", "main"):
        if len(page.all(tag)) != 1:
            found.append(f"not one {tag}")
    first = page.all("a")[:1]
    if not first or first[0].attributes.get("href") != "#main":
        found.append("the first link does not skip to the results")
    (body,) = page.all("body")
    landmarks = {"header", "nav", "main", "footer", "a"}
    found += [f"{x.tag} outside landmarks" for x in body.children if x.tag not in landmarks]
    return found


def _of_headings(page: Element) -> list[str]:
    levels = [int(x.tag[1]) for x in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    found = [] if levels.count(1) == 1 and levels[0] == 1 else ["not one h1, first"]
    jumps = [(a, b) for a, b in zip(levels, levels[1:], strict=False) if b > a + 1]
    return found + [f"h{b} follows h{a}" for a, b in jumps]


def _of_names(page: Element) -> list[str]:
    ids = Counter(x.attributes["id"] for x in page.all() if "id" in x.attributes)
    found = [f"id {name} twice" for name, count in ids.items() if count > 1]
    for element in page.all():
        for attribute in ("aria-labelledby", "aria-describedby"):
            for name in element.attributes.get(attribute, "").split():
                found += [] if name in ids else [f"{attribute} {name} leads nowhere"]
    regions = [x for x in page.all() if x.attributes.get("role") == "region" or x.tag == "section"]
    names = Counter(name_of(x, page) for x in regions)
    unclear = {name: count for name, count in names.items() if count > 1 or not name}
    return found + [f"{count} regions named {name!r}" for name, count in unclear.items()]


def _of_a_table(table: Element) -> list[str]:
    found = []
    around = table.parent
    assert around is not None
    wanted = {"role": "region", "tabindex": "0"}
    if not around.has_class("scroll") or not wanted.items() <= around.attributes.items():
        found.append("a table that does not scroll by keyboard")
    caption = [x for x in table.children if x.tag == "caption"]
    if len(caption) != 1 or not caption[0].text.strip():
        found.append("a table without a caption")
    for row in table.all("tr"):
        cells = [x for x in row.children if x.tag in ("th", "td")]
        scope = "col" if row.parent is not None and row.parent.tag == "thead" else "row"
        heads = [x for x in cells if x.tag == "th"]
        if not heads or any(x.attributes.get("scope") != scope for x in heads):
            found.append(f"a row without a th of scope {scope}")
        if len(cells) != len(table.all("thead")[0].all("th")):
            found.append("a row of another length than the head")
    return found


def _of_a_drawing(svg: Element, page: Element) -> list[str]:
    if svg.attributes.get("aria-hidden") == "true":
        return []
    words = [x.text.strip() for x in svg.children if x.tag == "desc"]
    if svg.attributes.get("role") != "img" or not name_of(svg, page):
        return ["a drawing without a name"]
    if len(words) != 1 or not re.search(r"\d", words[0]):
        return ["a drawing without its numbers in words"]
    return []
