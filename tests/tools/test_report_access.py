"""The page for readers who do not see it, have no mouse, or confuse colours, and on paper."""

from __future__ import annotations

import itertools
import re

import pytest
from colours import SEEN, contrast, distance
from pages import barriers, read
from results import ENCODER, RESULTS

pytest.importorskip("jinja2")

from clinattn.tools.report.colors import DARK, LIGHT, LINES, TEXTS, WAYS  # noqa: E402
from clinattn.tools.report.page import render  # noqa: E402

KINDS = RESULTS | {"encoder": ENCODER}
SCHEMES = {"light": LIGHT, "dark": DARK}


@pytest.fixture(scope="module")
def page():
    return render(*KINDS.values(), baseline=ENCODER)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_has_a_barrier(kind):
    assert barriers(render(KINDS[kind])) == []


def test_a_page_of_all_kinds_has_no_barrier(page):
    assert barriers(page) == []


@pytest.mark.parametrize(
    ("good", "bad", "barrier"),
    [
        ('<html lang="en">', "<html>", "no lang"),
        ('<main id="main"', '<div id="main"', None),
        ("</caption>", "", None),
        ('href="#main"', 'href="#words"', "the first link does not skip"),
        ('<th scope="row"', "<th", "a row without a th of scope row"),
        ('<th scope="col"', "<th", "a row without a th of scope col"),
        ('tabindex="0" aria-labelledby', "aria-labelledby", "does not scroll by keyboard"),
        ('class="scroll"', 'class="wide"', "does not scroll by keyboard"),
        ('<h2 id="s1">', '<h2 id="s9">', "aria-labelledby s1 leads nowhere"),
        ('<dt id="word-1">', '<dt id="word-0">', "id word-0 twice"),
        ('role="img" ', "", "a drawing without a name"),
        ("tokens a second; median and quartiles. torch", "</desc><desc>torch", "in words"),
        ("<span>Results</span>", "<span></span>", "a table without a caption"),
        ("<header>", "<header></header><div>x</div><header>", "not one header"),
    ],
)
def test_a_barrier_is_found(good, bad, barrier):
    html = render(ENCODER)
    assert good in html
    if barrier is None:  # a tag that is left open is found when the page is read
        with pytest.raises(AssertionError, match="closes|open"):
            barriers(html.replace(good, bad, 1))
    else:
        assert any(barrier in line for line in barriers(html.replace(good, bad)))


def test_contrast_and_distance_are_computed_as_published():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    assert distance("#ffffff", "#000000", SEEN["all cones"]) == pytest.approx(100, abs=0.1)
    red, green = "#b06060", "#608060"
    seen = {name: distance(red, green, matrix) for name, matrix in SEEN.items()}
    assert seen["deuteranopia"] < seen["all cones"] / 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_stand_out(scheme):
    colors = SCHEMES[scheme]
    for text, behind in itertools.product(TEXTS, ("page", "panel")):
        assert contrast(colors[text], colors[behind]) >= 4.5, (text, behind)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lines_stand_out_and_differ_for_colour_blind_readers(scheme):
    colors = SCHEMES[scheme]
    for name in (*LINES, "line"):
        assert contrast(colors[name], colors["page"]) >= 3, name
    for one, other in itertools.combinations(LINES, 2):
        for who, seen in SEEN.items():
            assert distance(colors[one], colors[other], seen) >= 10, (who, one, other)
    assert len(set(WAYS.values())) == 4


def test_both_schemes_and_paper_have_their_rules(page):
    (style,) = (x.text for x in read(page).all("style"))
    dark, _, paper = style.partition("@media print")
    assert LIGHT.keys() == DARK.keys()
    for scheme, text in (("prefers-color-scheme: dark", dark), ("", paper)):
        colors = DARK if scheme else LIGHT
        assert scheme in text
        assert all(f"--{name}: {value};" in text for name, value in colors.items())
    assert "details, .contents, .skip { display: none; }" in paper and "@page" in style
    assert ":focus-visible" in style and "overflow-x: auto" in style
    (phone,) = re.findall(r"@media screen and \(max-width: 47.99rem\) \{\n(.*?)\n\}", style, re.S)
    name = int(re.search(r"first-child \{ width: (\d+)cqi", phone)[1])
    other = int(re.search(r"td \+ td, .*min-width: (\d+)cqi", phone)[1])
    assert (100 - name) % other == 0  # whole columns, so that no number is cut
    assert f"scroll-padding-left: {name}%" in phone and "x mandatory" in phone


def test_no_text_has_a_colour_of_its_own(page):
    """Colours are those of the two schemes, whose contrast is computed above."""
    (style,) = (x.text for x in read(page).all("style"))
    rules = re.sub(r"--\w+: #\w{6};", "", style)
    assert not re.search(r"#[0-9a-f]{3,8}\b|rgb|hsl", rules)
    texts = set(re.findall(r"(?<![\w-])color: var\(--(\w+)\)", rules))
    assert texts <= set(TEXTS) and "ink" in texts
    assert set(re.findall(r"background: var\(--(\w+)\)", rules)) <= {"page", "panel"}


def test_heads_of_columns_lead_to_their_words(page):
    found = read(page)
    terms = {x.attributes["id"]: x.text for x in found.all("dt")}
    heads = [x for head in found.all("thead") for x in head.all("a")]
    linked = {x.text: x.attributes["href"][1:] for x in heads}
    for head in ("tokens/s", "quartiles", "padding", "peak MiB", "CPU share", "times as fast"):
        assert linked[head] in terms
    assert terms[linked["padding"]] == "Padding, padded"


def test_words_are_explained_where_they_are_used():
    terms = {kind: {x.text for x in read(render(KINDS[kind])).all("dt")} for kind in KINDS}
    assert {"Packed", "Length-bucketed", "Kernels", "torch SDPA"} <= terms["encoder"]
    assert {"OpenVINO", "RMS error"} & terms["engines"] == {"OpenVINO", "RMS error"}
    assert "OpenVINO" not in terms["encoder"] and "Packed" not in terms["parity"]
    assert "Error, as a share of what is allowed" in terms["parity"]
