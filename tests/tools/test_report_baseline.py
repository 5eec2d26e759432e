"""`clinattn report --baseline FILE`: each case then and now, and what else differs."""

from __future__ import annotations

import copy
import json

import pytest
from pages import assert_self_contained, barriers
from results import ENCODER, FACTS, RESULTS

pytest.importorskip("jinja2")
pytest.importorskip("typer")

from clinattn.tools.report.baseline import SAME, compare  # noqa: E402
from clinattn.tools.report.page import ReportError, render, sections_of  # noqa: E402
from clinattn.tools.report.section import UNITS  # noqa: E402

KINDS = RESULTS | {"encoder": ENCODER}
FASTER = 1.5


def changed(result, **facts):
    """A copy with other facts of the machine."""
    copied = copy.deepcopy(result)
    places = [copied.get("environment"), copied.get("here"), copied.get("base")]
    places += [copied.get("machine_info", {}).get("clinattn")]
    places += copied["rows"] if "rows" in copied else []
    for place in places:
        if place is not None and "torch" in place:
            place |= facts
    return copied


def quicker(value, name="", by=FASTER):
    """A copy in which rates are `by` times, and times one by-th, of what they were."""
    if isinstance(value, dict):
        return {k: quicker(v, k if not name.endswith("_s") else name, by) for k, v in value.items()}
    if isinstance(value, list):
        return [quicker(x, name, by) for x in value]
    if name in ("tokens_per_s", "gflop_per_s"):
        return value * by
    if name in ("ours_ms", "torch_ms", "here_s", "seconds"):
        return value / by
    return value


def rows_of(section, unit):
    (table,) = (table for table in section.tables if table.title == UNITS[unit].title)
    values = f"then, {unit}", f"now, {unit}"
    assert table.header == ("case", *values, UNITS[unit].ratio, "difference")
    return {row[0]: row[1:] for row in table.rows}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_compared_with_itself(kind):
    (found,) = compare(KINDS[kind], [KINDS[kind]])
    assert found.warnings == []
    assert ": 0 " in found.conclusion and ", 0 " in found.conclusion
    for table in found.tables:
        assert table.rows
        assert {(row[3], row[4]) for row in table.rows} == {("1.00", "the same")}
        assert all(row[1] == row[2] for row in table.rows)
    html = render(KINDS[kind], baseline=KINDS[kind])
    assert_self_contained(html)
    assert barriers(html) == []


def test_cases_then_and_now():
    now = changed(quicker(ENCODER), date="2026-05-06T00:00:00+00:00", commit="fedcba")
    (found,) = compare(ENCODER, [now])
    speed = rows_of(found, "tokens/s")
    assert speed["training, torch SDPA, padded"] == ("12,346*", "18,518*", "1.50", "faster")
    assert speed["training, clinattn, packed"] == ("37,037*", "55,555*", "1.50", "faster")
    assert rows_of(found, "MiB")["training, clinattn, padded"][2:] == ("1.00", "the same")
    assert found.conclusion == (
        "Since 2026-01-02, of 4 cases: 4 faster, 0 slower, 0 the same; the geometric mean is 1.50 "
        "times as fast."
    )
    then = "then: 2026-01-02, clinattn abcdef123456"
    assert found.origin == f"{then}; now: 2026-05-06, clinattn fedcba"
    assert found.warnings == []


@pytest.mark.parametrize(
    ("kind", "unit"), [("kernels", "ms"), ("compare", "ms"), ("suites", "tokens/s")]
)
def test_less_time_and_more_tokens_are_faster(kind, unit):
    (found,) = compare(KINDS[kind], [quicker(KINDS[kind])])
    assert {row[2:] for row in rows_of(found, unit).values()} == {("1.50", "faster")}
    (found,) = compare(quicker(KINDS[kind]), [KINDS[kind]])
    assert {row[2:] for row in rows_of(found, unit).values()} == {("0.67", "slower")}


def test_quartiles_that_meet_are_no_difference():
    rate = lambda median, q1, q3: {"median": median, "q1": q1, "q3": q3}
    now = copy.deepcopy(ENCODER)
    third = ENCODER["rows"][0]["tokens_per_s"]["q3"]
    now["rows"][0]["tokens_per_s"] = rate(13_500.0, third, 14_000.0)
    now["rows"][1]["tokens_per_s"] = rate(20_000.0, 19_000.0, 21_000.0)
    now["rows"][2]["tokens_per_s"] = rate(10_000.0, 9_000.0, 11_000.0)
    (found,) = compare(ENCODER, [now])
    verdicts = [row[3] for row in rows_of(found, "tokens/s").values()]
    assert verdicts == ["the same", "faster", "slower", "the same"]
    said = "of 4 cases: 1 faster, 1 slower, 2 the same"
    assert said in found.conclusion


def test_without_quartiles_five_per_cent_are_no_difference():
    then = RESULTS["kernels"]
    for by, verdict in ((1 + SAME * 0.9, "the same"), (1 + SAME * 1.1, "faster")):
        (found,) = compare(then, [quicker(then, by=by)])
        assert {row[3] for row in rows_of(found, "ms").values()} == {verdict}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fact", "value"),
    [("cpu", "another processor"), ("threads", 1), ("torch", "2.14.0"), ("gpu", "a card"),
     ("python", "3.13.0")],
)  # fmt: skip
def test_another_machine_or_version_is_a_warning(kind, fact, value):
    (found,) = compare(KINDS[kind], [changed(KINDS[kind], **{fact: value})])
    (warning,) = found.warnings
    was = "none" if fact == "gpu" else FACTS[fact]
    assert f"{fact} was {was} and is {value}" in warning and warning.count(" was ") == 1
    (table,) = found.backing
    assert (fact, "-" if fact == "gpu" else str(was), str(value)) in table.rows


def test_what_a_row_did_not_know_is_no_difference():
    then = copy.deepcopy(ENCODER)
    del then["environment"]["python"]
    (found,) = compare(then, [ENCODER])
    assert found.warnings == []


def test_other_work_is_a_warning():
    now = copy.deepcopy(ENCODER)
    now["settings"]["max_tokens"] = 99
    now["workload"]["real_tokens"] = 7
    (found,) = compare(ENCODER, [now])
    (warning,) = found.warnings
    assert "Not the same work" in warning
    assert "max_tokens was None and is 99" in warning and "real_tokens was 5000 and is 7" in warning


def test_cases_of_one_run_alone_are_named():
    now = copy.deepcopy(ENCODER)
    del now["rows"][0]
    now["rows"][0]["mode"] = "infer"
    (found,) = compare(ENCODER, [now])
    notes = "\n".join(found.notes)
    assert "Only then: training, torch SDPA, length-bucketed; training, torch SDPA, padded" in notes
    assert "Only now: inference, torch SDPA, length-bucketed" in notes


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ReportError, match="baseline holds rows of the kind kernels: expected enc"):
        sections_of([ENCODER], RESULTS["kernels"])
    now = copy.deepcopy(ENCODER)
    for row in now["rows"]:
        row["mode"] = "infer"
    with pytest.raises(ReportError, match="baseline has no case in common with results"):
        sections_of([now], ENCODER)


def test_the_comparison_comes_first_and_only_with_its_kind():
    found = sections_of([RESULTS["kernels"], ENCODER], ENCODER)
    assert [one.title for one in found] == [
        "Then and now: Encoder throughput on clinical sequences",
        "Attention alone, on the CPU",
        "Encoder throughput on clinical sequences",
    ]


def test_the_command_says_it_too(cli, tmp_path):
    (tmp_path / "then.json").write_text(json.dumps(ENCODER))
    now = changed(quicker(ENCODER), threads=1)
    (tmp_path / "now.json").write_text(json.dumps(now))
    done = cli("report", "now.json", "--baseline", "then.json")
    assert done.exit_code == 0, done.output
    assert "Since 2026-01-02, of 4 cases: 4 faster" in done.stdout
    assert "threads was 2 and is 1" in done.stderr
    html = (tmp_path / "report.html").read_text()
    assert "(2 of 2)" in html and "of 4 cases: 4 faster" in html


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "baseline='then.json' is empty: expected"),
        ('{"rows": []}', "baseline='then.json' has no rows: expected"),
        ("{}", "baseline='then.json' is no benchmark result: expected"),
        (json.dumps(RESULTS["pretrained"]), "baseline holds rows of the kind pretrained: expected"),
        (None, "baseline='then.json' cannot be read (No such file"),
    ],
)
@pytest.mark.parametrize("wrong", ["baseline", "results"])
def test_a_wrong_file_is_an_error_before_the_page(cli, tmp_path, content, message, wrong):
    (tmp_path / "good.json").write_text(json.dumps(ENCODER))
    if content is not None:
        (tmp_path / "then.json").write_text(content)
    if wrong == "baseline":
        done = cli("report", "good.json", "--baseline", "then.json")
    else:
        done = cli("report", "then.json", "--baseline", "good.json")
        message = message.replace("baseline='", "results='").replace(
            "the kind pretrained: expected", "the kind encoder: expected pretrained"
        )
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert message in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "report.html").exists()
