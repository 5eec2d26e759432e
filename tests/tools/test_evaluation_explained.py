"""The explanation of a prediction on the page of an evaluation."""

from __future__ import annotations

import json

import pytest

for package in ("pyarrow", "jinja2", "rich", "typer"):
    pytest.importorskip(package)

from explained_cases import record_of, timeline  # noqa: E402
from pages import assert_self_contained, barriers, read  # noqa: E402
from predictions import drawn, evaluate_file, write_binary  # noqa: E402
from terminal import flat  # noqa: E402

from clinattn.tools.evaluation.page import render  # noqa: E402
from clinattn.tools.explanation.words import conclusion, label  # noqa: E402

OWN = {"checkpoint": {"sha256": "ab", "name": "step-00000001.pt"}}


@pytest.fixture(scope="module")
def explanation():
    return record_of(timeline(12)) | {"checkpoint": "ab"}


def files(folder, explanation, facts=OWN):
    path = folder / "why.json"
    path.write_text(explanation if isinstance(explanation, str) else json.dumps(explanation))
    return write_binary(folder / "p.parquet", *drawn(60, 0), facts=facts), path


def test_the_page_has_figures_and_the_explanation(explanation, tmp_path):
    predictions, why = files(tmp_path, explanation)
    record = evaluate_file(predictions, resamples=100, explanation=why)
    html = render(record)
    page = read(html)
    assert_self_contained(html)
    assert not barriers(html)
    text = flat(page.text)
    assert flat(conclusion(explanation)) in text
    assert all(label(explanation["units"][i]) in text for i in explanation["strongest"])
    raw = json.loads(page.all("pre")[0].text)
    assert raw["explanation"] is None, "it stands on the page once"
    assert "One prediction" not in render(evaluate_file(predictions, resamples=100))


def test_files_with_the_data_of_a_person_are_private(cli, explanation, tmp_path):
    predictions, why = files(tmp_path, explanation)
    names = ["--output", "a.html", "--json", "a.json"]
    common = ["evaluate", predictions, "--resamples", "100", *names]
    done = cli(*common, "--explanation", why)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("which has the data of a person") == 2
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.html", "a.json")]
    assert modes == [0o600, 0o600]
    assert "data of a person" not in cli(*common).stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"checkpoint": "cd"}, "is of another checkpoint than the predictions"),
        ({"kind": "evaluation"}, "kind is 'evaluation': expected 'explanation'"),
        ({"strongest": [12]}, "strongest does not fit the rest"),
        ({"methods": ["a", "b"]}, "expected a method of explain"),
        ({"units": []}, "units is a list: expected a list of 1 or more"),
        ("{", "expected the JSON of clinattn explain"),
    ],
)
def test_another_file_is_an_error_before_any_work(change, message, explanation, tmp_path):
    changed = change if isinstance(change, str) else explanation | change
    predictions, why = files(tmp_path, changed)
    with pytest.raises(ValueError, match=message):
        evaluate_file(predictions, explanation=why)


def test_predictions_of_other_tools_name_no_checkpoint(explanation, tmp_path):
    predictions, why = files(tmp_path, explanation, facts={"checkpoint": "theirs"})
    assert evaluate_file(predictions, resamples=100, explanation=why)["explanation"] is not None
