"""Scores, deletion curves and the page of an explanation, of models whose answer is known."""

from __future__ import annotations

import re
import stat

import pytest
import torch
from colours import SEEN, contrast, distance
from explained_cases import Sum, Summing, case_of, note, record_of, timeline
from pages import assert_self_contained, barriers, read
from places import ROOT

for package in ("jinja2", "rich", "typer"):
    pytest.importorskip(package)

from clinattn.tools.explanation import scores, shades  # noqa: E402
from clinattn.tools.explanation.case import Unit, shown  # noqa: E402
from clinattn.tools.explanation.deletion import (  # noqa: E402
    SHARES,
    conclusions,
    counts,
    deletion,
    probability,
    verdict,
)
from clinattn.tools.explanation.note import by_words, words_and_spans  # noqa: E402
from clinattn.tools.explanation.page import render, write_page  # noqa: E402
from clinattn.tools.explanation.settings import ExplainSettings  # noqa: E402
from clinattn.tools.explanation.words import conclusion  # noqa: E402
from clinattn.tools.report.colors import DARK, LIGHT  # noqa: E402
from clinattn.workloads import SPECIAL_TOKENS, Vocabulary  # noqa: E402
from clinattn.workloads.text import lower_words  # noqa: E402

HOSTILE = "</p><script src=//x.example/a.js></script>{{ 7 * 7 }}\"' onload=x \x1b[31m\x00"


@pytest.fixture(scope="module")
def events():
    case = timeline(60)
    return case, record_of(case)


@pytest.fixture(scope="module")
def words():
    case = note("Fever <b>and</b> cough.\nNo sepsis. " * 8, [3.0, -2.0, *[0.1] * 38])
    return case, record_of(case)


def silent(*_):
    pass


def test_shares_are_those_of_a_sum(events):
    """Input times gradient of a sum is its terms."""
    case, record = events
    weights = case.model.weights[1:]
    expected = (weights / weights.abs().sum()).tolist()
    for column in range(2):  # integrated gradients of a sum are the same
        found = [unit["scores"][column] for unit in record["units"]]
        assert found == pytest.approx(expected, abs=1e-6)
    assert record["strongest"][:2] == [3, 2] and len(record["strongest"]) == 15
    assert record["agreement"] == {"top": 15, "shared": 15, "rank_correlation": pytest.approx(1)}
    by_visit = [group["scores"][0] for group in record["groups"]]
    assert by_visit == pytest.approx([sum(expected[i : i + 20]) for i in (0, 20, 40)], abs=1e-6)
    assert [group["units"] for group in record["groups"]] == [20, 20, 20]


def test_sub_words_are_summed_and_special_tokens_left_out():
    case = case_of([9.0, 1.0, 2.0, -1.0], [Unit("a"), Unit("b")], title="", unit="word")
    case = type(case)(**vars(case) | {"of_token": torch.tensor([-1, 0, 0, 1])})
    assert scores.shares(case, 1, "gradient_x_input") == pytest.approx([0.75, -0.25])
    assert case.without(torch.tensor([0])).tolist() == [0, 3]
    assert case.without(torch.tensor([1])).tolist() == [0, 1, 2]


def test_the_logit_of_a_class_is_less_those_of_the_others():
    case = timeline(9)
    out = type("Out", (), {"logits": torch.tensor([[1.0, 5.0, 3.0]])})
    case.model.classes = ("a", "b", "c")
    assert scores.contrast(case, 1)(out).tolist() == [3.0]
    case.model.independent = True
    assert scores.contrast(case, 1)(out).tolist() == [5.0]
    logits = torch.tensor([[0.0, 2.0]])
    assert case.probabilities(logits)[0].tolist() == pytest.approx([0.5, 0.8807971])


def test_ties_stand_in_their_order():
    assert scores.ranked([1.0, -2.0, 2.0, 1.0]) == [1, 2, 0, 3]
    assert scores.in_favour([1.0, -2.0, 2.0, 1.0]) == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 2, 4], [1, 3, 2, 4], 0.9486832980505138),  # of ranks 1, 2.5, 2.5, 4
        ([1, 1], [1, 2], None),
    ],
)
def test_rank_correlation_is_that_of_spearman(one, other, expected):
    found = scores.rank_correlation(one, other)
    assert found == (None if expected is None else pytest.approx(expected))


def test_overlap_counts_the_strongest_of_both():
    assert scores.overlap([5, -4, 0.1, 0], [0, -9, 8, 0.2], 2) == 1


def test_a_deletion_curve_is_that_of_the_sum(events):
    case, record = events
    curve = record["deletion"]
    assert curve["shares"] == list(SHARES) and curve["counts"] == counts(60) == [1, 1, 3, 6, 12, 30]
    weights = case.model.weights[1:].sort(descending=True).values
    expected = [float((weights.sum() - weights[:n].sum()).sigmoid()) for n in curve["counts"]]
    assert curve["methods"]["gradient_x_input"] == pytest.approx(expected, abs=1e-6)
    assert len(curve["random"]) == 8 and len({tuple(draw) for draw in curve["random"]}) > 1
    assert record_of(case)["deletion"] == curve  # the seed says what is drawn
    assert record_of(case, seed=1)["deletion"]["random"] != curve["random"]
    assert record["probability"] == pytest.approx(float(case.model.weights.sum().sigmoid()))


@pytest.mark.parametrize(
    ("weights", "order", "true"),
    [
        ([0.0, 6.0, *[0.0] * 30], "right", True),
        ([0.0, 6.0, *[0.0] * 30], "wrong", False),
        ([0.0, 1e-4, *[1e-4] * 30], "right", None),
    ],
    ids=["found", "not better than random", "nothing matters"],
)
def test_a_verdict_is_honest(weights, order, true):
    case = case_of(weights, [Unit(str(i)) for i in range(31)], title="", unit="word")
    given = weights[1:] if order == "right" else [-x + 1e-6 * i for i, x in enumerate(weights[1:])]
    whole = float(torch.tensor(weights).sum().sigmoid())
    curve = deletion(case, 1, {"attnlrp": given, "rollout": given}, 8, 0, silent)
    assert verdict(curve, "attnlrp", whole).true is true
    said, _ = conclusions(curve, whole, "present", "word")
    assert "removing the 5 % (2 words) that speak most for present" in said
    assert ("do not rely on this" in said) == (true is False)
    assert ("cannot say" in said) == (true is None)
    assert ("here the explanation is true of the model" in said) == (true is True)


@pytest.mark.parametrize(
    ("found", "true"), [(0.2, True), (0.45, False), (0.9, False)], ids=["below", "among", "above"]
)
def test_every_draw_has_to_be_beaten(found, true):
    curve = {"methods": {"attnlrp": [found] * 6}, "random": [[0.4] * 6, [0.5] * 6]}
    assert verdict(curve, "attnlrp", 0.9).true is true


def test_probabilities_do_not_round_to_certainty():
    texts = [probability(x).replace("\u00a0", " ") for x in (0.0, 1e-9, 0.25, 0.99999, 1.0)]
    assert texts == ["0.000", "< 0.001", "0.250", "> 0.999", "1.000"]


def test_one_word_is_enough():
    record = record_of(note("fever", [2.0]))
    assert record["deletion"]["counts"] == [1] * 6
    assert record["agreement"]["rank_correlation"] is None
    assert barriers(render(record, note("fever", [2.0]))) == []


def test_the_conclusion_names_three_for_and_three_against(events):
    text = conclusion(events[1]).replace("\u00a0", " ")
    assert text.startswith("Probability of present: 0.7")
    found = re.search(r"Most in favour: (.*)\. Most against: (.*?)\. Removing", text)
    assert found[1].count("%") == found[1].count("(+") == 3
    assert found[2].count("%") == found[2].count("(\u2212") == 3


@pytest.mark.parametrize("kind", ["events", "words"])
def test_the_page_has_no_barrier_and_fetches_nothing(kind, request):
    case, record = request.getfixturevalue(kind)
    html = render(record, case)
    assert barriers(html) == []
    assert_self_contained(html)
    assert html == render(record, case)
    page = read(html)
    assert page.all("h1")[0].text.startswith("Why “present”?")
    assert "data of a person" in page.all("main")[0].text


@pytest.mark.parametrize("kind", ["events", "words"])
def test_each_strongest_leads_to_its_place_and_back(kind, request):
    case, record = request.getfixturevalue(kind)
    page = read(render(record, case))
    by_id = {x.attributes["id"]: x for x in page.all() if "id" in x.attributes}
    for i in record["strongest"]:
        row, place = by_id[f"r{i}"], by_id[f"u{i}"]
        assert row.tag == "tr" and [a.attributes["href"] for a in row.all("a")] == [f"#u{i}"]
        back = [place, *place.all("a")]
        assert f"#r{i}" in [x.attributes.get("href") for x in back]
        sign = "+" if record["units"][i]["scores"][0] > 0 else "\u2212"
        assert place.all("sup")[0].text.startswith(sign)


def test_the_note_is_there_to_the_last_sign(words):
    case, record = words
    page = read(render(record, case))
    (text,) = (x for x in page.all("p") if x.has_class("note-text"))
    for mark in text.all("sup"):
        text.text = text.text.replace("\u2060" + mark.text, "", 1)
    assert text.text == case.text
    assert not page.all("b")  # of the note, which is text


def test_events_are_all_there_by_time(events):
    case, record = events
    page = read(render(record, case))
    shown = [x for x in page.all("details")]
    assert [x.all("summary")[0].text for x in shown] == [
        f"All 20 events of Visit {i}" for i in (1, 2, 3)
    ]
    for details, start in zip(shown, (0, 20, 40), strict=True):
        text = details.all("dl")[0].text
        assert text.count(".5") == 20
        assert all(unit.when in text for unit in case.units[start : start + 20])


@pytest.mark.parametrize("kind", ["event", "note"])
def test_no_text_of_a_record_is_trusted(kind, tmp_path):
    if kind == "event":
        case = timeline(12, names=[HOSTILE])
    else:
        case = note(f"fever {HOSTILE} cough {HOSTILE}")
    record = record_of(case)
    record["title"] += HOSTILE
    record["target"] += HOSTILE
    record["classes"] = {name + HOSTILE: x for name, x in record["classes"].items()}
    record["facts"] = {HOSTILE: HOSTILE}
    record["warnings"] = [HOSTILE]
    html = render(record, case)
    assert not {x.tag for x in read(html).all()} & {"script", "link", "img", "iframe"}
    assert not any(name.startswith("on") for x in read(html).all() for name in x.attributes)
    assert "<script" not in html and "{{ 7 * 7 }}" in html


def test_nothing_is_marked_as_safe():
    templates = list((ROOT / "clinattn" / "tools" / "explanation").glob("*.j2"))
    assert len(templates) == 2
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|autoescape|Markup|<script|url\(", text)


@pytest.mark.parametrize("before", [None, 0o644])
def test_the_page_is_for_its_owner_alone(events, tmp_path, before):
    path = tmp_path / "p.html"
    if before is not None:
        path.write_text("x")
        path.chmod(before)
    case, record = events
    write_page(record, case, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [x.name for x in tmp_path.iterdir()] == ["p.html"]


def test_long_timelines_and_notes_stay_small():
    many = timeline(10_000, visits=12)
    assert len(render(record_of(many, draws=2), many).encode()) < 3 << 20
    long = note("heart failure, with a preserved ejection fraction. " * 1143)
    assert len(long.units) >= 8000
    assert len(render(record_of(long, draws=2), long).encode()) < 3 << 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_every_shade(scheme):
    colors, own = {"light": LIGHT, "dark": DARK}[scheme], shades.SHADES[scheme]
    assert list(own) == [f"{side}{i}" for side in ("for", "against") for i in range(1, 6)]
    for name, color in own.items():
        assert contrast(colors["ink"], color) >= 4.5, name
    for seen in SEEN.values():  # 2.3 is just noticed
        assert distance(own["for5"], own["against5"], seen) > 10
        for side in ("for", "against"):
            steps = [distance(colors["page"], own[f"{side}{i}"], seen) for i in range(1, 6)]
            assert steps == sorted(steps) and steps[0] > 2.3


def test_shades_have_steps():
    assert [shades.step(x, 1.0) for x in (0.04, 0.05, -0.2, 0.4, -0.6, 1.0)] == [0, 1, 2, 3, 4, 5]
    assert shades.step(0.0, 0.0) == 0
    assert shades.mixed("#ffffff", "#000000", 0.5) == "#808080"


def test_a_word_has_its_place_though_lower_case_is_longer():
    text = "A\u0130b \u0130, c\u03a3 end"  # lower-cased, \u0130 is two characters
    tokens = (*SPECIAL_TOKENS, *(match[0] for match in lower_words(text)))
    known = {"text": "n.txt"}
    words = by_words(text, Vocabulary(tokens[:-1]), ExplainSettings("c", **known))
    spelled = [text[slice(*span)] for span in words.spans]
    assert spelled == ["A\u0130", "b", "\u0130", ",", "c\u03a3", "end"]
    assert words.of_token == [0, 0, 1, 2, 2, 3, 4, 5]  # its dot is a sign of training
    assert words.known == [True] * 5 + [False]


def test_chinese_characters_have_places_in_either_width():
    text = "胸痛３天，ＣＲＰ　12mg"
    tokens = (*SPECIAL_TOKENS, *(match[0] for match in lower_words(text)))
    words = by_words(text, Vocabulary(tokens), ExplainSettings("c", text="n.txt"))
    spelled = [text[slice(*span)] for span in words.spans]
    assert spelled == ["胸", "痛", "３", "天", "，", "ＣＲＰ", "12mg"] and all(words.known)
    assert [tokens[i] for i in words.ids] == ["胸", "痛", "3", "天", ",", "crp", "12mg"]


def test_control_characters_are_shown_as_such():
    assert shown("a\x1b[31m\x00\n\tb\u202e") == "a\ufffd[31m\ufffd\n\tb\ufffd"
    case = note("fever \x1b[31m cough \x07")
    assert not {"\x1b", "\x07"} & set(render(record_of(case), case))


def test_words_of_sub_words_have_places_without_spaces():
    text = " sep sis,\n500mg"
    offsets = [(0, 2), (2, 4), (4, 8), (8, 9), (10, 13), (13, 15)]
    numbers, spans = words_and_spans(text, [0, 0, 1, 2, 3, None], offsets)
    assert numbers == [0, 0, 1, 2, 3, 3]
    assert [text[slice(*span)] for span in spans] == ["sep", "sis", ",", "500mg"]


def test_the_sums_model_is_its_module():
    """The two ways of explained_cases agree, or the tests above would compare two models."""
    weights = torch.tensor([0.5, -1.0, 2.0])
    model = Sum(weights, Summing(weights))
    everything = model.logits([torch.arange(3)])
    torch.testing.assert_close(model.module(**model.inputs).logits.double(), everything)
