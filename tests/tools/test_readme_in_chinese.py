"""README.zh-CN.md says what README.md says: the same sections, code, tables, figures and links."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from documentation import README, split
from places import ROOT

CHINESE = ROOT / "README.zh-CN.md"
HEADING = re.compile(r"^(#+) .+$", re.MULTILINE)
FIGURE = re.compile(r"\d(?:[\d,.:-]*\d)?")
LINK = re.compile(r"\]\(([^)]+)\)")
EACH_OTHER = {"README.md", "README.zh-CN.md"}


def text(page):
    return page.read_text(encoding="utf-8")


def sections(page):
    """(level of the heading, text below it) for each section, fenced blocks left out."""
    without_code = split(page)[1]
    parts = HEADING.split(without_code)
    return list(zip((len(level) for level in parts[1::2]), parts[2::2], strict=True))


def figures(text):
    return Counter(FIGURE.findall(text))


def differences(one, other):
    """Sections by number whose level, figures or links are not the same, and what differs."""
    found = {}
    for at, ((level, a), (also, b)) in enumerate(zip(one, other, strict=True)):
        if level != also:
            found[at] = (level, also)
        elif figures(a) != figures(b):
            found[at] = (figures(a) - figures(b), figures(b) - figures(a))
        elif links(a) != links(b):
            found[at] = (links(a), links(b))
    return found


def links(text):
    return sorted(target for target in LINK.findall(text) if target not in EACH_OTHER)


def rows(text):
    """The cells of figures of each line of a table, in order."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell for cell in line.split("|")[2:] if FIGURE.search(cell)] for line in lines]


def test_sections_are_the_same_in_number_and_order():
    english, chinese = sections(README), sections(CHINESE)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    assert differences(english, chinese) == {}


def test_code_is_the_same():
    of = lambda page: [(block.language, block.code) for block in split(page)[0]]
    assert of(README) == of(CHINESE) and len(of(README)) >= 8


def test_tables_have_the_same_figures_in_the_same_cells():
    english, chinese = rows(split(README)[1]), rows(split(CHINESE)[1])
    assert english == chinese and len(english) >= 12


def test_each_names_the_other_in_its_first_lines():
    for page, other in ((README, CHINESE), (CHINESE, README)):
        assert f"]({other.name})" in "\n".join(text(page).splitlines()[:5])


def test_it_is_chinese_and_uses_the_words_of_the_field():
    chinese = text(CHINESE)
    prose = split(CHINESE)[1]
    assert len(re.findall(r"[\u4e00-\u9fff]", prose)) > 1000
    for word in ("注意力", "变长打包", "滑动窗口", "出院小结", "时间线", "可复现", "填充", "梯度"):
        assert word in chinese, word
    for line in prose.splitlines():  # a whole sentence that was left in English
        assert not re.search(r"(?:\b[a-z]+\b[ ,]+){6,}", line), line


@pytest.mark.parametrize(
    "chinese, at",
    [
        ("# a\n\n5 个\n## b\n\n6 [x](y)\n", None),
        ("# a\n\n5 个\n## b\n\n7 [x](y)\n", 1),
        ("# a\n\n五个\n## b\n\n6 [x](y)\n", 0),
        ("# a\n\n5 个\n## b\n\n6 [x](z)\n", 1),
        ("# a\n\n5 个\n### b\n\n6 [x](y)\n", 1),
    ],
)
def test_a_difference_is_found(tmp_path, chinese, at):
    pages = [tmp_path / "one.md", tmp_path / "other.md"]
    pages[0].write_text("# a\n\n5 of them\n## b\n\n6 [x](y)\n")
    pages[1].write_text(chinese)
    assert list(differences(*map(sections, pages))) == ([] if at is None else [at])
