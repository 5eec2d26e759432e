"""The figures of docs/compared.md are those of kept rows, or of tables that are held to them."""

from __future__ import annotations

import json
import re

from places import ROOT

ROWS = ROOT / "bench" / "results" / "gpu-nvidia-h100-2026-11-28-first.jsonl"
PACKED = {
    "32 discharge notes, 66,510 tokens": ("note_discharge", None),
    "8 intensive-care timelines, window of 128": ("ehr_icu", 128),
    "1,024 rows of up to 128 tokens": ("note_chunks", None),
}


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def packed_lines() -> list[str]:
    """Times of FlashAttention-2 on packed sequences over those of Triton, forward / backward."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    ms = {
        tuple(row[x] for x in ("profile", "window", "dim", "direction", "provider")): row["ms"]
        for row in rows
        if row["stage"] == "clinical" and "ms" in row
    }

    def cell(profile: str, window: int | None, dim: int) -> str:
        ratios = (
            ms[profile, window, dim, way, "torch-varlen"]
            / ms[profile, window, dim, way, "clinattn-triton-packed"]
            for way in ("forward", "backward")
        )
        return " / ".join(f"{ratio:.2f}" for ratio in ratios)

    return [
        f"| {label} | {cell(*case, 64)} | {cell(*case, 128)} |" for label, case in PACKED.items()
    ]


def test_every_line_of_figures_is_measured():
    """The other lines are those of README and docs/speed.md, as test_readme_figures.py reads."""
    page = [line for line in read("compared.md").splitlines() if line.startswith("| ")]
    known = [*read("speed.md").splitlines(), *read("../README.md").splitlines(), *packed_lines()]
    figures = [line for line in page if re.search(r"\| [\d,.]+( / [\d,.]+)? \|", line)]
    assert len(figures) >= 11
    assert [line for line in figures if line not in known] == []


def test_the_sizes_in_the_labels_are_those_of_the_rows():
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    clinical = {row["profile"]: row for row in rows if row["stage"] == "clinical" and "ms" in row}
    for label, (profile, _) in PACKED.items():
        assert label.startswith(f"{clinical[profile]['sequences']:,} ")
    assert f"{clinical['note_discharge']['tokens']:,} tokens" in list(PACKED)[0]
    facts = next(row for row in rows if "driver" in row)
    assert f"{facts['gpu']}, torch {facts['torch']}" in read("compared.md")
    assert facts["date"][:10] in read("compared.md")
