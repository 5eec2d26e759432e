"""clinattn predict on the rows of a file, with a checkpoint of clinattn train."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

for package in ("pyarrow", "rich", "typer"):
    pytest.importorskip(package)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from predicted import facts_of, trained  # noqa: E402
from terminal import flat  # noqa: E402

from clinattn.training.checkpoint import load_model  # noqa: E402
from clinattn.training.objectives import HELD_OUT_EPOCH, Classification  # noqa: E402
from clinattn.training.start import make_corpus  # noqa: E402
from clinattn.training.windows import by_note  # noqa: E402

LABELS = ("cough", "rest", "sepsis")


def write_rows(path, **columns):
    """Forty notes whose label is one of their words; some are longer than a window."""
    rows = [
        {"text": f"Fever and {LABELS[i % 3]}, no. {'1 2 3 ' * (i % 5)}", "label": LABELS[i % 3]}
        | {name: of(i) for name, of in columns.items()}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The settings and checkpoint of a classifier of words, and its file."""
    root = tmp_path_factory.mktemp("texts")
    path = write_rows(root / "t.jsonl", subject_id=lambda i: i // 2)
    return trained(root / "out", text_file=path, label_code=None, max_tokens=9)


@pytest.fixture
def run(cli, texts, small_presets, threads):
    threads(1)
    names = {"TEXTS": texts[1], "FILE": texts[0].data}
    return lambda *args: cli("predict", *(names.get(arg, arg) for arg in args))


def test_rows_are_in_their_order_with_all_classes(run, texts, tmp_path):
    done = run("TEXTS", "--data", "FILE", "--output", "p.parquet")
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "p.parquet")
    probabilities = [f"probability_{name}" for name in LABELS]
    assert table.column_names == ["row", "subject_id", "label", "predicted_label", *probabilities]
    assert table.schema.field("subject_id").type == pa.int64()
    settings, path = texts
    corpus = make_corpus(settings, None)
    objective = Classification(corpus)
    every = list(range(len(corpus.held_out)))
    batch = objective.batch(every, HELD_OUT_EPOCH, torch.device("cpu"))
    with torch.inference_mode():
        windows = batch.run(load_model(path)[0]).logits
    logits = by_note(windows, corpus.held_out, settings.pool)
    assert len(logits) < len(windows)
    found = np.stack([table[name].to_numpy() for name in probabilities], 1)
    np.testing.assert_allclose(found, logits.softmax(1), rtol=1e-5)
    rows, subjects = (table[name].to_pylist() for name in ("row", "subject_id"))
    assert rows == sorted(rows) and subjects == [row // 2 for row in rows]
    assert table["label"].to_pylist() == [LABELS[row % 3] for row in rows]
    best = [LABELS[i] for i in logits.argmax(1)]
    assert table["predicted_label"].to_pylist() == best
    assert facts_of(tmp_path / "p.parquet")["data"] == "t.jsonl"


def test_windows_are_of_a_length_and_pooled_as_asked(run, tmp_path):
    """The first window alone is another answer, and the mean of equal windows is theirs."""
    (tmp_path / "n.csv").write_text(f"text\n{'fever ' * 8}\n{'fever ' * 16}\n{'rest ' * 30}\n")
    found = {}
    ways = {
        "mean": ([], 9 * (1 + 3 + 5)),
        "first": (["--pool", "first"], 9 * 3),
        "max": (["--pool", "max", "--overlap", "0"], 9 + 18 + 34),
    }
    for name, (more, tokens) in ways.items():
        files = ["--output", f"{name}.parquet", "--embeddings", f"{name}-e.parquet", *more]
        done = run("TEXTS", "--data", "text:n.csv", "--split", "all", *files)
        assert done.exit_code == 0, done.output
        table = pq.read_table(tmp_path / f"{name}.parquet")
        found[name] = np.stack([table[f"probability_{x}"].to_numpy() for x in LABELS], 1)
        assert f"3 rows, {tokens} tokens" in done.stderr
    np.testing.assert_allclose(found["mean"][0], found["mean"][1], rtol=1e-6)
    np.testing.assert_allclose(found["mean"], found["first"], rtol=1e-6)
    states = np.stack(pq.read_table(tmp_path / "mean-e.parquet")["embedding"].to_numpy())
    np.testing.assert_allclose(states[0], states[1], rtol=1e-5)


def test_a_file_without_subjects_or_labels(run, tmp_path):
    (tmp_path / "n.csv").write_text("text\nFever and cough\nRest\n")
    done = run("TEXTS", "--data", "text:n.csv", "--output", "p.parquet", "--split", "all")
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names[:2] == ["row", "predicted_label"] and len(table) == 2
    assert "Fever" not in str(table) and "known:" not in done.stdout
    assert re.search(r"\d+\.\d% of events or words are new", done.stderr) is None


def test_subjects_that_are_no_numbers_and_labels_of_no_class(run, tmp_path):
    write_rows(tmp_path / "n.jsonl", subject_id=lambda i: f"A{i}", label=lambda i: f"L{i % 2}")
    given = ["--data", "text:n.jsonl", "--output", "p.parquet", "--embeddings", "e.parquet"]
    done = run("TEXTS", *given, "--split", "all")
    assert done.exit_code == 0, done.output
    assert "2 labels are no class of the model, such as 'L0'" in flat(done.stderr)
    table = pq.read_table(tmp_path / "p.parquet")
    assert table["subject_id"].to_pylist()[:2] == ["A0", "A1"]
    states = pq.read_table(tmp_path / "e.parquet")
    assert states.column_names == ["row", "subject_id", "embedding"] and len(states) == 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "meds:x"], "was trained on texts: expected data text:FILE"),
        (["--data", "text:absent.csv"], "text_file='absent.csv' cannot be read"),
        (["--data", "text:u.csv"], "the checkpoint knows none of its codes or words"),
        (["--data", "FILE", "--at-end"], "at_end: expected only with timelines"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, given, message):
    (tmp_path / "u.csv").write_text("text\nxylophone\n")
    done = run("TEXTS", *given, "--output", "p.parquet")
    assert done.exit_code == 2 and message in flat(done.stderr)
    assert not list(tmp_path.glob("p.parquet*"))
