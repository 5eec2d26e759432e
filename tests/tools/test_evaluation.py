"""Figures of predictions and their intervals, where the answer is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

for package in ("pyarrow", "jinja2", "rich", "typer"):
    pytest.importorskip(package)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from pages import assert_self_contained, barriers, read  # noqa: E402
from predictions import drawn, evaluate_file, write_binary  # noqa: E402

from clinattn.tools.evaluation.binary import Binary  # noqa: E402
from clinattn.tools.evaluation.bootstrap import intervals, weights_of  # noqa: E402
from clinattn.tools.evaluation.others import Classes, Numbers  # noqa: E402
from clinattn.tools.evaluation.page import render  # noqa: E402
from clinattn.tools.evaluation.recalibration import log_odds, recalibrate  # noqa: E402
from clinattn.tools.evaluation.words import conclusion  # noqa: E402

HOSTILE = "</p><script src=a.js></script>{{ 7 * 7 }}"


def binary(truth, scores, threshold=0.5, bins=10):
    truth, scores = np.asarray(truth, bool), np.asarray(scores, float)
    return Binary(truth, scores, scores >= threshold, True, bins)


def measured(measure, rows):
    return {name: x[0] for name, x in measure(np.ones((1, rows))).items()}


def test_figures_by_hand():
    """Four rows with a tie of both classes at 0.5."""
    found = measured(binary([1, 0, 1, 0], [0.9, 0.5, 0.5, 0.1], bins=2), 4)
    assert found["auroc"] == (1 + 1 + 0.5 + 1) / 4
    assert found["auprc"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-15)
    assert found["brier"] == pytest.approx((0.01 + 0.25 + 0.25 + 0.01) / 4, abs=1e-15)
    assert found["sensitivity"] == 1 and found["specificity"] == 0.5
    assert found["precision"] == 2 / 3 and found["negative_precision"] == 1
    assert found["accuracy"] == 0.75
    # the tie stays in one group: 0.9 with it, of two positives among three, and 0.1
    assert found["observed_over_expected"] == pytest.approx(1, abs=1e-15)


def test_auroc_is_the_share_of_pairs():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 9, 60) / 9, rng.random(60) < 0.4
    pairs = (scores[truth][:, None] > scores[~truth]) + 0.5 * (
        scores[truth][:, None] == scores[~truth]
    )
    assert measured(binary(truth, scores), 60)["auroc"] == pytest.approx(pairs.mean(), abs=1e-15)


def test_a_weight_is_as_many_copies_of_a_row():
    truth, scores = drawn(80, 1)
    scores = scores.round(1)
    weights = np.random.default_rng(2).integers(0, 4, 80)
    copied = binary(np.repeat(truth, weights), np.repeat(scores, weights))
    mine = binary(truth, scores)
    # groups of calibration are those of the rows themselves
    edges = [np.flatnonzero(copied.levels == x)[0] for x in mine.levels[mine.edges]]
    copied.edges = np.array(edges)
    theirs = measured(copied, weights.sum())
    for name, x in mine(weights[None].astype(float)).items():
        np.testing.assert_allclose(x[0], theirs[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.6, -0.4), (1.7, 0.9)])
def test_recalibration_finds_slope_and_intercept(slope, shift):
    """Within five standard errors, by the information that the fit itself has."""
    truth, p = drawn(20_000, 3, slope, shift)
    order = np.argsort(-p)
    x, yes = log_odds(p[order]), truth[order].astype(float)[None]
    (intercept,), (found,) = recalibrate(x, yes, 1 - yes, None)
    share = 1 / (1 + np.exp(-(intercept + found * x)))
    design = np.stack((np.ones_like(x), x))
    errors = np.sqrt(np.diag(np.linalg.inv(design * (share * (1 - share)) @ design.T)))
    assert abs(intercept - shift) < 5 * errors[0] and abs(found - slope) < 5 * errors[1]
    # at the best line the residuals are orthogonal to 1 and x
    np.testing.assert_allclose(design @ (yes[0] - share), 0, atol=1e-8)


@pytest.mark.parametrize(
    ("truth", "scores"),
    [([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1]), ([0, 0, 1], [0.9, 0.5, 0.5]), ([1, 0], [0.5, 0.5])],
    ids=["apart", "reversed with a tie", "one score"],
)
def test_there_is_no_line_where_a_score_parts_the_classes(truth, scores):
    found = measured(binary(truth, scores), len(truth))
    assert math.isnan(found["slope"]) and math.isnan(found["intercept"])


def test_lines_are_found_from_far():
    """Scores close to 0 and 1, of which some are wrong."""
    truth = np.array([1, 1, 0, 0, 1, 0])
    found = measured(binary(truth, [1 - 1e-7, 0.999, 0.998, 1e-6, 0, 1e-3]), 6)
    assert math.isfinite(found["slope"])


def test_resamples_draw_patients_with_all_their_rows():
    patient = np.array([0, 0, 0, 1, 2, 2])
    weights = np.concatenate(list(weights_of(patient, 300, 0)))
    assert weights.shape == (300, 6)
    assert (weights[:, [0, 0, 4]] == weights[:, [1, 2, 5]]).all()
    assert (weights[:, [0, 3, 4]].sum(1) == 3).all()
    again = np.concatenate(list(weights_of(patient, 300, 0)))
    assert (weights == again).all() and weights.std() > 0


def test_intervals_cover_the_truth():
    """AUROC of normal scores one apart, four rows a patient with the same score.

    The covered share of 300 samples is binomial at 0.95: beyond these bounds it is one in 10,000.
    Resamples of rows would cover about two thirds.
    """
    area = 0.5 * math.erfc(-1 / 2)  # of N(0, 1) against N(1, 1): Phi(1 / sqrt(2))
    samples, patients, copies = 300, 80, 4
    spread = math.sqrt(0.05 * 0.95 / samples)
    rng, inside = np.random.default_rng(11), {True: 0, False: 0}
    for i in range(samples):
        truth = np.arange(patients) % 2 == 0
        scores = rng.normal(truth.astype(float), 1)
        truth, scores = np.repeat(truth, copies), np.repeat(scores, copies)
        measure = Binary(truth, scores, scores > 0, False, 10)
        for by_patient in inside:
            rows = np.arange(len(truth))
            drawn_by = rows // copies if by_patient else rows
            found = intervals(measure, drawn_by, 200, i, lambda _: None)["auroc"]
            inside[by_patient] += bool(found.low <= area <= found.high)
    assert abs(inside[True] / samples - 0.95) <= 3.9 * spread
    assert inside[False] / samples < 0.8


def test_intervals_do_not_depend_on_the_chunks(monkeypatch):
    truth, scores = drawn(100, 4)
    found = []
    for chunk in (1, 1 << 20):
        monkeypatch.setattr("clinattn.tools.evaluation.bootstrap.CHUNK", chunk)
        found.append(intervals(binary(truth, scores), np.arange(100), 150, 5, lambda _: None))
    for name in found[0]:
        for mine, other in zip(found[0][name], found[1][name], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12, err_msg=name)


def test_classes_and_numbers_by_hand():
    truth, scores = np.array([0, 1, 1, 2]), np.eye(4, 3)
    scores[1:] = [[0.5, 0.5, 0], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]]
    found = measured(Classes(truth, scores, np.array([0, 0, 1, 2])), 4)
    assert found["accuracy"] == 0.75 and found["auroc"] == 1
    expected = -np.log([1, 0.5, 0.6, 0.5]).mean()
    assert found["log_loss"] == pytest.approx(expected, abs=1e-15)
    found = measured(Numbers(np.array([1.0, 2, 3]), np.array([1.0, 2, 5])), 3)
    assert found["mae"] == pytest.approx(2 / 3) and found["rmse"] == pytest.approx((4 / 3) ** 0.5)
    assert found["r2"] == pytest.approx(1 - 4 / 2)


# Whole files


def test_a_perfect_file(tmp_path):
    truth = [True, False] * 20
    record = evaluate_file(write_binary(tmp_path / "p.parquet", truth, np.array(truth, float)))
    figures = record["groups"][0]["figures"]
    assert figures["auroc"] | {"undefined": 0} == {
        "value": 1, "low": 1, "high": 1, "undefined": 0, "note": "",
    }  # fmt: skip
    assert figures["brier"]["value"] == 0 and figures["slope"]["note"] == "classes apart"
    assert any("wholly apart" in x for x in record["warnings"])


def test_a_constant_file_is_as_good_as_the_prevalence(tmp_path):
    record = evaluate_file(
        write_binary(tmp_path / "p.parquet", [True, False, False, False] * 9, [0.25] * 36)
    )
    whole = record["groups"][0]
    for name, x in whole["baseline"].items():
        assert whole["figures"][name]["value"] == pytest.approx(x)
    assert whole["figures"]["slope"]["note"] == "one score for all"
    assert "cannot be told from chance" in conclusion(record)


def test_one_class_alone_has_words_for_figures(tmp_path):
    record = evaluate_file(write_binary(tmp_path / "p.parquet", [False] * 9, np.arange(9) / 10))
    figures = record["groups"][0]["figures"]
    assert figures["auroc"] == {
        "value": None, "low": None, "high": None, "undefined": 1000, "note": "no positives",
    }  # fmt: skip
    assert figures["brier"]["value"] is not None
    assert "no positives" in conclusion(record) and "no positives" in render(record)


def test_one_patient_of_a_class_has_no_interval(tmp_path):
    record = evaluate_file(
        write_binary(tmp_path / "p.parquet", [True] + [False] * 9, np.arange(10) / 10)
    )
    area = record["groups"][0]["figures"]["auroc"]
    assert area["value"] == 0 and area["low"] is None
    assert area["note"] == "too few for an interval"
    assert any("1 patients with the outcome" in x for x in record["warnings"])


def test_scores_that_are_no_probabilities_rank_alone(tmp_path):
    truth, p = drawn(200, 5)
    record = evaluate_file(write_binary(tmp_path / "p.parquet", truth, log_odds(p)))
    alike = evaluate_file(write_binary(tmp_path / "q.parquet", truth, p.astype(np.float32)))
    figures = record["groups"][0]["figures"]
    assert figures["auroc"] == alike["groups"][0]["figures"]["auroc"]
    assert "brier" not in figures and any("beyond 0 to 1" in x for x in record["warnings"])


def test_labels_that_are_null_are_counted_and_rows_twice_too(tmp_path):
    path = write_binary(
        tmp_path / "p.parquet",
        [True, False, None, True, True],
        [0.9, 0.2, None, 0.4, 0.4],
        subject=[1, 2, 3, 4, 4],
        prediction_time=pa.array([0, 0, 0, 7, 7], pa.timestamp("us")),
    )
    record = evaluate_file(path, resamples=100)
    assert (record["rows"], record["patients"]) == (4, 3)
    assert (record["unlabelled"], record["duplicates"]) == (1, 1)
    said = " ".join(record["warnings"])
    assert "1 rows without a label" in said and "1 of 4 rows repeat" in said


def test_decisions_alone_are_measured(tmp_path):
    path = write_binary(
        tmp_path / "p.parquet",
        [True, False, True, False] * 6,
        [None] * 24,
        predicted_boolean_value=pa.array([True, False, False, False] * 6),
    )
    record = evaluate_file(path, resamples=100)
    assert record["groups"][0]["figures"]["sensitivity"]["value"] == 0.5
    assert "75" in conclusion(record) and not barriers(render(record))
    with pytest.raises(ValueError, match="threshold=0.4: the file has decisions alone"):
        evaluate_file(path, threshold=0.4)


def test_a_threshold_takes_the_place_of_the_files_decisions(tmp_path):
    path = write_binary(
        tmp_path / "p.parquet", [True, False] * 9, [0.4, 0.1] * 9,
        predicted_boolean_value=pa.array([False, False] * 9),
    )  # fmt: skip
    own, other = (evaluate_file(path, resamples=100, threshold=x) for x in (None, 0.3))
    found = [x["groups"][0]["figures"]["sensitivity"]["value"] for x in (own, other)]
    assert found == [0, 1] and other["threshold"] == 0.3


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1]}, "has the columns ['a']: expected subject_id with boolean_value"),
        ({"subject_id": [1], "boolean_value": [True]}, "expected subject_id with"),
        (
            {"boolean_value": [True, True], "predicted_boolean_probability": [0.5, math.nan]},
            "is null, NaN or infinite in 1 of 2 labelled rows",
        ),
        (
            {"boolean_value": [True, True], "predicted_boolean_probability": [0.5, None]},
            "is null, NaN or infinite in 1 of 2 labelled rows",
        ),
        (
            {"boolean_value": [1, 0], "predicted_boolean_probability": [0.5, 0.5]},
            "boolean_value has type int64: expected booleans",
        ),
        (
            {"boolean_value": [True], "predicted_boolean_probability": ["x"]},
            "has type string: expected floating numbers",
        ),
        (
            {"boolean_value": [None], "predicted_boolean_probability": [0.5]},
            "all 1 rows have null boolean_value: expected labels",
        ),
        (
            {"label": ["a"], "probability_a": [0.5], "probability_b": [0.4]},
            "add up to 0.9 to 0.9: expected probabilities, which add up to 1",
        ),
        (
            {"label": ["c"], "probability_a": [0.5], "probability_b": [0.5]},
            "label='c': expected one of ['a', 'b']",
        ),
        (
            {"subject_id": [None, 1], "value": [1.0, 1.0], "predicted_value": [1.0, 2.0]},
            "subject_id has nulls",
        ),
    ],
)
def test_a_bad_file_is_an_error_that_says_why(columns, message, tmp_path):
    with pytest.raises(ValueError) as error:
        evaluate_file(write(tmp_path / "p.parquet", **columns))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file_and_none_are_errors(tmp_path):
    path = write_binary(tmp_path / "p.parquet", [], [])
    with pytest.raises(ValueError, match="has no rows: expected predictions"):
        evaluate_file(path)
    (tmp_path / "x.parquet").write_bytes(b"no")
    for name in ("x.parquet", "absent.parquet"):
        with pytest.raises(ValueError, match=f"predictions=.*{name}' cannot be read"):
            evaluate_file(tmp_path / name)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of the three kinds; names of groups and classes are hostile."""
    root = tmp_path_factory.mktemp("records")
    truth, p = drawn(300, 6, 0.7)
    rng = np.random.default_rng(7)
    subject = rng.integers(0, 120, 300)
    sex = pa.array([("F", "M", HOSTILE, None)[i % 4] for i in range(300)])
    facts = {"data": HOSTILE, "checkpoint": {"name": "step-1.pt", "sha256": "0" * 64}}
    binary = write_binary(root / "b.parquet", truth, p, subject, facts, sex=sex)
    scores = rng.dirichlet((1, 1, 1), 300)
    label = [("a", "b", HOSTILE)[rng.choice(3, p=x)] for x in scores]
    classes = write(
        root / "c.parquet", row=np.arange(300), label=label,
        **{f"probability_{x}": scores[:, i] for i, x in enumerate(("a", "b", HOSTILE))},
    )  # fmt: skip
    value = rng.normal(50, 9, 300)
    off = rng.normal(0, 4, 300)
    numbers = write(
        root / "n.parquet", subject_id=subject, value=value, predicted_value=value + off
    )
    by = {binary: ("sex",), classes: (), numbers: ("predicted_value",)}
    return [evaluate_file(path, by[path], resamples=100) for path in (binary, classes, numbers)]


def test_pages_are_self_contained_and_have_no_barrier(records):
    for record in records:
        html = render(record)
        assert_self_contained(html)
        assert not barriers(html)
        page = read(html)
        assert page.all("header")[0].all("p")[0].text == conclusion(record)


def test_every_number_of_a_page_is_in_its_data(records):
    for record in records:
        assert json.loads(json.dumps(record))["groups"][0]["rows"] == 300
        (raw,) = read(render(record)).all("pre")
        assert json.loads(raw.text)["groups"] == record["groups"]


def test_the_calibration_groups_are_of_equal_size(records):
    bins = records[0]["groups"][0]["reliability"]
    assert [x["rows"] for x in bins] == [30] * 10
    assert [x["predicted"] for x in bins] == sorted(x["predicted"] for x in bins)
    for x in bins:
        assert x["from"] <= x["predicted"] <= x["to"] and x["low"] <= x["observed"] <= x["high"]
    off = sum(x["rows"] * abs(x["predicted"] - x["observed"]) for x in bins) / 300
    figure = records[0]["groups"][0]["figures"]["calibration_error"]
    assert figure["value"] == pytest.approx(off, abs=1e-12)


def test_a_slope_below_one_is_said(tmp_path):
    truth, p = drawn(2000, 8, 0.5)
    said = conclusion(evaluate_file(write_binary(tmp_path / "p.parquet", truth, p), resamples=100))
    assert "better than chance" in said and "too extreme" in said
    truth, p = drawn(2000, 9)
    said = conclusion(evaluate_file(write_binary(tmp_path / "p.parquet", ~truth, p), resamples=100))
    assert "worse than chance" in said


def test_few_patients_do_not_prove_calibration(tmp_path):
    def said(rows):
        path = write_binary(tmp_path / f"{rows}.parquet", *drawn(rows, seed=1))
        return conclusion(evaluate_file(path, resamples=200))

    assert "agree with what happened" in said(2000)
    truth, p = np.arange(30) % 10 == 0, np.tile([0.1, 0.11, 0.12], 10)
    path = write_binary(tmp_path / "few.parquet", truth, p)
    record = evaluate_file(path, resamples=200)
    assert "too few patients to tell whether" in conclusion(record)
    assert record["groups"][0]["figures"]["precision"]["note"] == "all are a no"
