"""The links of an HTML page that a browser would fetch: none, if the page is self-contained."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Links(HTMLParser):
    """Everything a browser would fetch, and the tags that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href", "srcset", "data") and v]
        assert tag not in ("script", "link", "iframe", "img")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(html: str) -> None:
    links = Links()
    links.feed(html)
    assert links.found == [] and links.open == []
    assert not re.search(r"(https?:)?//\w|url\(|@import", html)
    assert '<meta name="viewport"' in html and "@media print" in html
