"""Words of texts: widths, cases and Chinese characters, each with its place in the text."""

import pytest

from clinattn.workloads.words import folded, lower_words, origins


def words(text: str) -> list[str]:
    return [found[0] for found in lower_words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Chest pain, 40mg", ["chest", "pain", ",", "40mg"]),
        ("患者胸痛3天", ["患", "者", "胸", "痛", "3", "天"]),
        ("血压１４２／８８ｍｍＨｇ，", ["血", "压", "142", "/", "88mmhg", ","]),
        ("Ｈｂ\u3000１２", ["hb", "12"]),
        ("カルテ ｶﾙﾃ の", ["カ", "ル", "テ", "カ", "ル", "テ", "の"]),
        ("환자는 흉통", ["환자는", "흉통"]),
        ("CT提示𠮷例", ["ct", "提", "示", "𠮷", "例"]),
        ("x² 5µg naïve", ["x²", "5µg", "naïve"]),
    ],
    ids=["latin", "chinese", "full", "space", "kana", "hangul", "beyond 16 bits", "as before"],
)
def test_words_of_a_text(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("text", ["患者：ＢＰ １４２", "İzmir 胸痛", "ｶﾞ ￣x", "一日３ｍｇ"])
def test_each_word_is_where_its_characters_are(text):
    places = origins(text)
    assert len(places) == len(folded(text)) and places == sorted(places)
    for found in lower_words(text):
        start, end = places[found.start()], places[found.end() - 1] + 1
        assert found[0] in folded(text[start:end])


def test_half_and_full_width_are_the_same_words():
    full = "".join(chr(ord(c) + 0xFEE0) for c in "ABCxyz0189")
    assert words(full) == words("ABCxyz0189") == ["abcxyz0189"]
