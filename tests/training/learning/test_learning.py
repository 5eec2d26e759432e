"""Every task is learnt: the loss falls below what can be had without attention."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from runs import rows_of, small_run  # noqa: E402

from clinattn.training.loop import Trainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_presets")


@pytest.fixture
def settings(tmp_path):
    folder = write_patients(tmp_path / "meds", patients=60)
    return partial(small_run, meds_dir=folder, output=tmp_path / "out")


def test_masked_language_models_learn_what_frequencies_do_not_say(settings, tmp_path):
    trainer = Trainer(settings(steps=250, batch_tokens=512, lr=1e-2, eval_every=250))
    trainer.run()
    last = rows_of(tmp_path / "out")[-1]
    assert last["loss"] < last["unigram_entropy"] - 0.5 and last["accuracy"] > 0.4


def test_causal_language_models_learn_what_comes_next(settings, tmp_path):
    Trainer(settings("clm", steps=150, batch_tokens=512, lr=1e-2, eval_every=150)).run()
    last = rows_of(tmp_path / "out")[-1]
    assert last["loss"] < last["unigram_entropy"] - 0.5


def test_classifiers_learn_the_future_of_others(settings, tmp_path):
    Trainer(settings("classify", steps=80, batch_tokens=512, lr=1e-2, eval_every=80)).run()
    first, last = (row for row in rows_of(tmp_path / "out") if row["split"] == "held_out")
    assert last["accuracy"] > 0.9 > last["base_rate"] and last["auroc"] > 0.95
    assert last["loss"] < 0.5 * last["base_loss"] and first["loss"] > last["loss"]


def test_what_follows_is_learnt(settings, tmp_path):
    """Texts keep to one of four topics, so that a random part is told three times of four."""
    path = tmp_path / "a.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(300):
        words = torch.randint(3, (12,), generator=generator).tolist()
        text = " ".join(f"topic{i % 4}word{word}" for word in words)
        rows.append({"text": text, "subject_id": i})
    path.write_text("\n".join(map(json.dumps, rows)))
    source = {"meds_dir": None, "text_file": path, "preset": "typed", "nsp": True, "max_tokens": 24}
    Trainer(settings(**source, steps=800, batch_tokens=256, lr=5e-3, eval_every=800, seed=4)).run()
    last = rows_of(tmp_path / "out")[-1]
    assert last["nsp_accuracy"] > last["nsp_base_rate"] + 0.15
