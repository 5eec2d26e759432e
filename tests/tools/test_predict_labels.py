"""clinattn predict at the prediction times of task labels: yes or no, classes, and numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

for package in ("pyarrow", "rich", "typer"):
    pytest.importorskip(package)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from patients import DAY, write_events, write_labels, write_measured_patients  # noqa: E402
from predicted import bits_of, facts_of, trained  # noqa: E402
from terminal import flat  # noqa: E402

from clinattn.training.checkpoint import load_model  # noqa: E402
from clinattn.training.objectives import HELD_OUT_EPOCH  # noqa: E402
from clinattn.training.start import make_corpus, make_objective  # noqa: E402
from clinattn.workloads import open_source  # noqa: E402

VALUES = {
    "boolean_value": lambda i: i % 3 == 0,
    "categorical_value": lambda i: "abc"[i % 3],
    "float_value": lambda i: 50.0 + i % 7,
}


def rows_of(folder, value):
    """Three labels for each patient, the latest first; the first of them is before all events."""
    source = open_source(f"meds:{folder}")
    rows = []
    for index, subject in enumerate(source.subjects):
        start, timed, end = source.bounds(index)
        times = [source.times[timed] - 1, source.times[(timed + end) // 2], source.times[end - 1]]
        rows += [(subject, int(x), value(len(rows) + i)) for i, x in enumerate(times[::-1])]
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_measured_patients(tmp_path_factory.mktemp("meds"))


@pytest.fixture(scope="module")
def tasks(folder, tmp_path_factory):
    """For each column of labels its file, the settings and the checkpoint."""
    root = tmp_path_factory.mktemp("tasks")
    found = {}
    for column, value in VALUES.items():
        path = write_labels(root / column / "0.parquet", rows_of(folder, value), column)
        given = {"label_code": None, "labels": path.parent, "preset": "timed"}
        found[column] = path.parent, *trained(root / f"{column}-run", meds_dir=folder, **given)
    return found


@pytest.fixture
def run(cli, folder, small_presets, threads):
    threads(1)
    return lambda model, *args: cli("predict", model, "--data", f"meds:{folder}", *args)


@pytest.mark.parametrize("column", VALUES)
def test_predictions_are_those_of_evaluation_at_the_times_of_labels(column, run, tasks, tmp_path):
    labels, settings, path = tasks[column]
    done = run(path, "--labels", labels, "--output", "p.parquet")
    assert done.exit_code == 0, done.output
    corpus = make_corpus(settings, None)
    objective = make_objective(settings, corpus, load_model(path)[0].encoder.config)
    every = list(range(len(corpus.held_out)))
    batch = objective.batch(every, HELD_OUT_EPOCH, torch.device("cpu"))
    with torch.inference_mode():
        logits = batch.run(load_model(path)[0]).logits.double()
    table = pq.read_table(tmp_path / "p.parquet")
    known = {row[:2]: row[2] for row in rows_of(settings.data.partition(":")[2], VALUES[column])}
    moments = list(
        zip(table["subject_id"].to_pylist(), table["prediction_time"].cast(pa.int64()).to_pylist(),
            strict=True)
    )  # fmt: skip
    assert moments == sorted(moments) and len(moments) == len(every) > 10
    # labels are by time in the file of predictions, and the latest first in that of labels
    order = np.array([[i + 2, i + 1, i] for i in range(0, len(every), 3)]).ravel()
    logits = logits[order]
    expected = [known[moment] for moment in moments]
    if column == "boolean_value":
        assert table["boolean_value"].to_pylist() == expected
        p = table["predicted_boolean_probability"].to_numpy()
        np.testing.assert_allclose(p, logits.softmax(1)[:, 1], rtol=1e-5)
        evaluation = pytest.importorskip("meds_evaluation.schema")
        assert evaluation.PredictionSchema.align(table).schema.equals(table.schema)
    elif column == "categorical_value":
        assert table["label"].to_pylist() == expected
        p = np.stack([table[f"probability_{name}"].to_numpy() for name in "abc"], 1)
        np.testing.assert_allclose(p, logits.softmax(1), rtol=1e-5)
    else:
        assert table["value"].to_pylist() == expected
        numbers = logits[:, 0] * corpus.target.scale + corpus.target.mean
        np.testing.assert_allclose(table["predicted_value"].to_numpy(), numbers, rtol=1e-6)
        assert re.search(r"predicted: mean [\d.]+, from .* known: mean", flat(done.stdout))
    said = flat(done.stderr)
    assert f"{len(moments)} of 120 rows of labels are predicted" in said
    assert f"{len(moments) // 3} have no event until prediction_time" in said
    assert facts_of(tmp_path / "p.parquet")["settings"]["labels"] == column


@pytest.mark.parametrize("column", VALUES)
def test_without_labels_it_is_the_end_of_each_timeline(column, run, tasks, tmp_path):
    path = tasks[column][2]
    assert run(path, "--output", "p.parquet", "--split", "all").exit_code == 0
    table = pq.read_table(tmp_path / "p.parquet")
    known = {"boolean_value", "label", "value"}
    assert len(table) == 40 and not known & set(table.column_names)


def test_labels_of_which_nothing_is_known_and_of_other_subjects(run, tasks, folder, tmp_path):
    """Labels as for patients of today: times alone, and a subject who is not in the data."""
    rows = [(s, t, None) for s, t, _ in rows_of(folder, VALUES["boolean_value"])] + [(99, 5, None)]
    write_labels(tmp_path / "today.parquet", rows, boolean_value=pa.nulls(len(rows), pa.bool_()))
    given = ["--labels", "today.parquet", "--split", "all", "--output"]
    done = run(tasks["boolean_value"][2], *given, "p.parquet")
    assert done.exit_code == 0, done.output
    assert "1 are of subjects that the data have not" in flat(done.stderr)
    table = pq.read_table(tmp_path / "p.parquet")
    assert len(table) == 120 and "boolean_value" not in table.column_names


def test_a_prediction_knows_nothing_after_its_time(run, tasks, folder, tmp_path):
    """The file has the same bits when all events after the times of labels are taken away."""
    labels, _, path = tasks["boolean_value"]
    rows = [row for row in rows_of(folder, VALUES["boolean_value"]) if row[0] <= 20]
    last = {}
    for subject, time, _ in rows:
        last.setdefault(subject, []).append(time)
    middle = {subject: sorted(times)[1] for subject, times in last.items()}
    kept = [row for row in rows if row[1] <= middle[row[0]]]
    write_labels(tmp_path / "middle.parquet", kept)
    events = pq.read_table(folder / "data" / "0.parquet")
    columns = [events[x].to_pylist() for x in ("subject_id", "code", "numeric_value")]
    columns.insert(1, events["time"].cast(pa.int64()).to_pylist())
    past = [
        row for row in zip(*columns, strict=True)
        if row[1] is None or row[1] <= middle.get(row[0], 0)
    ]  # fmt: skip
    write_events(tmp_path / "past", past)
    given = ["--labels", "middle.parquet", "--split", "all", "--output"]
    assert run(path, *given, "p.parquet").exit_code == 0
    assert run(path, "--data", "meds:past", *given, "q.parquet").exit_code == 0
    one, two = bits_of(tmp_path / "p.parquet"), bits_of(tmp_path / "q.parquet")
    assert one.equals(two) and len(one) == 40 and len(past) < len(events) - 100


def test_a_model_of_codes_or_of_tokens_takes_labels_too(run, folder, tmp_path, tasks):
    labels = tasks["boolean_value"][0]
    by_code = trained(tmp_path / "code", meds_dir=folder, cuts=2)[1]
    masked = trained(tmp_path / "mlm", "mlm", meds_dir=folder)[1]
    given = ["--labels", labels, "--split", "all"]
    assert run(by_code, *given, "--output", "p.parquet").exit_code == 0
    assert run(masked, *given, "--embeddings", "e.parquet").exit_code == 0
    one, two = (pq.read_table(tmp_path / name) for name in ("p.parquet", "e.parquet"))
    assert len(one) == 120 and one["prediction_time"].equals(two["prediction_time"])


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        ("boolean_value", ["--labels", "absent"], "labels='absent' does not exist"),
        ("boolean_value", ["--labels", "other.parquet"], "none of its 1 rows has a subject of"),
        ("boolean_value", ["--labels", "OTHER"], "has float_value: expected boolean_value, which"),
        ("float_value", ["--labels", "other.parquet"], "has boolean_value: expected float_value"),
        ("boolean_value", ["--labels", "OTHER", "--at-end"], "at_end and labels: got both"),
    ],
)
def test_bad_labels_are_one_line(column, options, message, run, tasks, tmp_path):
    write_labels(tmp_path / "other.parquet", [(99, DAY, True)])
    options = [str(tasks["float_value"][0]) if x == "OTHER" else x for x in options]
    done = run(tasks[column][2], *options, "--output", "p.parquet")
    assert done.exit_code == 2 and message in flat(done.stderr), done.output
    assert not list(tmp_path.glob("p.parquet*"))
