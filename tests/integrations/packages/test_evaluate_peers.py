"""clinattn evaluate against scikit-learn and meds-evaluation, on the same file."""

from __future__ import annotations

import math

import numpy as np
import pytest

for package in ("pyarrow", "sklearn", "rich", "typer"):
    pytest.importorskip(package)

from predictions import drawn, evaluate_file, write_binary  # noqa: E402

SAME = 1e-12  # of sums of 1,000 terms of at most 1, each rounded in fp64


def draws(ties: bool):
    """1,000 rows of fp32 probabilities, as files keep them."""
    truth, p = drawn(1000, 12, 0.8)
    return truth, (p.round(2) if ties else p).astype(np.float32)


@pytest.fixture(params=[False, True], ids=["distinct", "ties"])
def file(request, tmp_path):
    truth, p = draws(request.param)
    subject = np.random.default_rng(0).integers(0, 300, len(truth))
    said = {"predicted_boolean_value": p >= 0.5}
    return truth, p, write_binary(tmp_path / "p.parquet", truth, p, subject, **said)


def test_figures_are_those_of_scikit_learn(file):
    from sklearn import metrics
    from sklearn.linear_model import LogisticRegression

    truth, p, path = file
    found = {k: x["value"] for k, x in evaluate_file(path)["groups"][0]["figures"].items()}
    p = p.astype(np.float64)
    for name, expected in (
        ("auroc", metrics.roc_auc_score(truth, p)),
        ("auprc", metrics.average_precision_score(truth, p)),
        ("brier", metrics.brier_score_loss(truth, p)),
        ("sensitivity", metrics.recall_score(truth, p >= 0.5)),
        ("precision", metrics.precision_score(truth, p >= 0.5)),
        ("accuracy", metrics.accuracy_score(truth, p >= 0.5)),
    ):
        assert found[name] == pytest.approx(expected, abs=SAME), name
    inside = p.clip(2**-24, 1 - 2**-24)
    line = LogisticRegression(C=math.inf, tol=1e-10, max_iter=1000)
    line.fit(np.log(inside / (1 - inside))[:, None], truth)
    # its solver stops where the mean gradient is below tol; the curvature here is above 0.1
    assert found["slope"] == pytest.approx(line.coef_.item(), abs=1e-7)
    assert found["intercept"] == pytest.approx(line.intercept_.item(), abs=1e-7)


def test_classes_and_numbers_are_those_of_scikit_learn(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn import metrics

    rng = np.random.default_rng(1)
    scores = rng.dirichlet((1, 2, 3), 500)
    truth = np.array([rng.choice(3, p=x) for x in scores])
    names = [f"c{i}" for i in range(3)]
    table = {f"probability_{x}": scores[:, i] for i, x in enumerate(names)}
    table |= {"label": [names[i] for i in truth], "row": range(500)}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    record = evaluate_file(tmp_path / "c.parquet", resamples=100)
    found = {k: x["value"] for k, x in record["groups"][0]["figures"].items()}
    expected = metrics.roc_auc_score(truth, scores, multi_class="ovr", average="macro")
    assert found["auroc"] == pytest.approx(expected, abs=SAME)
    assert found["log_loss"] == pytest.approx(metrics.log_loss(truth, scores), abs=SAME)
    value = rng.normal(5, 2, 500)
    said = value + rng.normal(size=500)
    table = {"subject_id": range(500), "value": value, "predicted_value": said}
    pq.write_table(pa.table(table), tmp_path / "n.parquet")
    record = evaluate_file(tmp_path / "n.parquet", resamples=100)
    found = {k: x["value"] for k, x in record["groups"][0]["figures"].items()}
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(value, said), abs=SAME)
    assert found["r2"] == pytest.approx(metrics.r2_score(value, said), abs=SAME)


def test_meds_evaluation_reads_the_file_and_agrees(file):
    pl = pytest.importorskip("polars")
    theirs = pytest.importorskip("meds_evaluation.evaluate")
    path = file[-1]
    result = theirs.evaluate_binary_classification(pl.read_parquet(path))
    expected = result["samples_equally_weighted"]
    found = {k: x["value"] for k, x in evaluate_file(path)["groups"][0]["figures"].items()}
    assert found["auroc"] == pytest.approx(expected["roc_auc_score"], abs=SAME)
    assert found["auprc"] == pytest.approx(expected["average_precision_score"], abs=SAME)
    assert found["accuracy"] == pytest.approx(expected["binary_accuracy"], abs=SAME)
    assert found["brier"] == pytest.approx(expected["brier_score"], abs=SAME)
