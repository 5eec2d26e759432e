"""Methods are held against an answer that is known: one code of a real timeline makes the label.

    pytest tests/explain/learning
    CLINATTN_TESTS=every pytest tests/explain/learning

print the rates and seconds of each method, the table of docs/explain.md, for an encoder of width 32
and for the preset tiny, of width 192.
"""

from __future__ import annotations

import json
import os
import re
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

for package in ("pyarrow", "jinja2", "rich", "typer"):
    pytest.importorskip(package)

from pages import read  # noqa: E402
from places import ROOT  # noqa: E402
from planted import CAUSE, HELD_OUT, write_planted  # noqa: E402
from runs import SMALL  # noqa: E402

from clinattn.encoder import PRESETS  # noqa: E402
from clinattn.tools.explanation import explain, scores, timeline  # noqa: E402
from clinattn.tools.explanation.deletion import deletion, verdict  # noqa: E402
from clinattn.tools.explanation.page import render  # noqa: E402
from clinattn.tools.explanation.settings import METHODS, ExplainSettings  # noqa: E402
from clinattn.training.checkpoint import checkpoints  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402
from clinattn.workloads.seeds import is_held_out  # noqa: E402

DEMO = Path(
    os.environ.get("CLINATTN_MEDS_DIR") or ROOT.parent / "shared" / "data" / "mimic-iv-demo-meds"
)
pytestmark = pytest.mark.skipif(
    not DEMO.is_dir(), reason="no MEDS demo: set CLINATTN_MEDS_DIR to a MEDS folder"
)
WANTED = 0.95  # of the patients, for at least one method
FIRST = 3  # the place that the cause must be among
PATIENTS = 100


class Rates(NamedTuple):
    """Shares of the patients whose cause is among the first; and what removals say."""

    strongest: float
    in_favour: float
    true: float
    seconds: float  # a patient


class World(NamedTuple):
    cases: list
    settings: list
    accuracy: float


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A classifier that knows the rule, and the held-out patients with the cause."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    if os.environ.get("CLINATTN_TESTS") != "every":
        patch.setitem(PRESETS, "tiny", SMALL)
    root = tmp_path_factory.mktemp("planted")
    planted = write_planted(DEMO, root / "meds")
    data, output = f"meds:{root / 'meds'}", root / "out"
    Trainer(
        TrainingSettings(
            data=data,
            task="classify",
            label_code="OUTCOME*",
            held_out=HELD_OUT,
            max_tokens=128,
            batch_tokens=2048,
            steps=400,
            eval_every=100,
            save_every=400,
            threads=1,
            output=output,
        )
    ).run()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["accuracy"] for row in rows if row["split"] == "held_out"][-1]
    chosen = [x for x, cause in planted.items() if cause and is_held_out(x, HELD_OUT)][:PATIENTS]
    settings = [
        ExplainSettings(str(checkpoints(output)[-1]), data=data, patient=str(x), target="present")
        for x in chosen
    ]
    patch.setattr(timeline, "open_source", cache(timeline.open_source))  # one folder
    yield World([explain.read_case(x) for x in settings], settings, accuracy)
    patch.undo()
    torch.set_num_threads(threads)


def cause_of(case) -> int:
    """The place of the only event that is the cause."""
    (at,) = (i for i, unit in enumerate(case.units) if unit.name == CAUSE)
    return at


def rates(cases, method: str) -> Rates:
    target = 1
    found, started = [], time.perf_counter()
    for case in cases:
        found.append(scores.shares(case, target, method))
    seconds = (time.perf_counter() - started) / len(cases)
    pairs = list(zip(cases, found, strict=True))
    strongest = [cause_of(case) in scores.ranked(x)[:FIRST] for case, x in pairs]
    in_favour = [cause_of(case) in scores.in_favour(x)[:FIRST] for case, x in pairs]
    true = []
    for case, x in pairs:
        curve = deletion(case, target, {method: x}, draws=8, seed=0, progress=lambda *_: None)
        everything = torch.arange(len(case.of_token))
        whole = float(case.probabilities(case.model.logits([everything]))[0, target])
        true.append(verdict(curve, method, whole).true is True)
    share = lambda hits: sum(hits) / len(hits)
    return Rates(share(strongest), share(in_favour), share(true), seconds)


def test_the_cause_is_found(world, capsys):
    assert len(world.cases) >= 50 and world.accuracy >= 0.98
    found = {method: rates(world.cases, method) for method in METHODS}
    with capsys.disabled():
        width = world.cases[0].model.module.encoder.config.hidden_size
        print(f"\n{len(world.cases)} patients, width {width}, accuracy {world.accuracy:.3f}")
        for method, x in found.items():
            print(
                f"| `{method}` | {x.strongest:.0%} | {x.in_favour:.0%} | {x.true:.0%} | "
                f"{1000 * x.seconds:.0f} ms |"
            )
    assert max(x.in_favour for x in found.values()) >= WANTED
    for method in list(METHODS)[:2]:  # the command's own
        assert found[method].strongest >= WANTED and found[method].in_favour >= WANTED, method
        assert found[method].true >= 0.9, method


def test_the_page_shows_the_cause_among_its_first_three(world):
    case, settings = world.cases[0], world.settings[0]
    record = explain.explained(case, settings, lambda *_: None)
    page = read(render(record, case))
    (table,) = (x for x in page.all("table") if "strongest" in x.all("caption")[0].text.lower())
    rows = table.all("tbody")[0].all("tr")[:FIRST]
    assert any(CAUSE in row.all("th")[0].text for row in rows)
    at = cause_of(case)
    link = next(x for x in page.all("a") if x.attributes["href"] == f"#r{at}")
    assert CAUSE in link.text and re.match(r"for\d strong", link.attributes["class"])
    (conclusion,) = (x for x in page.all("p") if x.has_class("conclusion"))
    assert re.search(rf"Most in favour: {CAUSE}", conclusion.text)
