"""Chinese discharge notes of a template, with digits and letters in both widths."""

from __future__ import annotations

import random
from typing import NamedTuple

WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
COMPLAINTS = {
    "心内科": ("胸痛", "心悸", "活动后气促", "双下肢水肿"),
    "呼吸科": ("咳嗽", "咳痰", "发热", "咯血"),
    "消化科": ("腹痛", "腹胀", "黑便", "恶心呕吐"),
}
SIGNS = ("神志清楚", "皮肤无黄染", "双肺呼吸音粗", "腹软无压痛", "病理反射未引出")


class Note(NamedTuple):
    text: str
    label: str


def discharge_note(rng: random.Random) -> Note:
    """A note of a department, whose complaints tell it, and of numbers that tell nothing."""
    label = rng.choice(sorted(COMPLAINTS))
    complaint = rng.choice(COMPLAINTS[label])
    numbers = (
        f"T {rng.randint(360, 400) / 10} P {rng.randint(55, 120)} "
        f"BP {rng.randint(95, 180)}/{rng.randint(50, 110)} mmHg, CRP {rng.randint(1, 200)} mg/L"
    )
    if rng.random() < 0.5:
        numbers = numbers.translate(WIDE)
    who = f"{rng.choice('男女')}，{rng.randint(20, 90)}岁"
    text = (
        f"患者{who}。主诉：{complaint}{rng.randint(2, 14)}天。"
        f"查体：{numbers}。{rng.choice(SIGNS)}。经治疗后{complaint}好转，予以出院。"
    )
    return Note(text, label)


def discharge_notes(count: int, seed: int = 0) -> list[Note]:
    rng = random.Random(seed)
    return [discharge_note(rng) for _ in range(count)]
