"""clinattn evaluate as a command: subgroups, files and errors."""

from __future__ import annotations

import json

import numpy as np
import pytest

for package in ("pyarrow", "jinja2", "rich", "typer"):
    pytest.importorskip(package)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from patients import DAY, write_events  # noqa: E402
from predictions import drawn, write_binary  # noqa: E402

QUICK = ["--resamples", "100"]


@pytest.fixture
def predictions(tmp_path):
    """100 rows of 50 patients, from day 0 on, a row a day."""
    truth, p = drawn(100, 0)
    times = pa.array([i * DAY for i in range(100)], pa.timestamp("us"))
    subject = np.arange(100) // 2
    facts = {"data": "made up", "split": "held_out"}
    return write_binary(tmp_path / "p.parquet", truth, p, subject, facts, prediction_time=times)


def run(cli, path, *args):
    done = cli("evaluate", path, *QUICK, "--json", "out.json", *args)
    assert done.exit_code == 0, done.output
    return done, json.loads(open("out.json").read())


def sizes(record, by):
    return {x["name"]: (x["patients"], x["rows"]) for x in record["groups"] if x["by"] == by}


def test_the_same_command_writes_the_same_numbers_and_a_page(cli, predictions):
    done, first = run(cli, predictions, "--output", "page.html")
    page = open("page.html").read()
    assert "wrote page.html" in done.stdout and "AUROC" in done.stdout
    assert "held_out" in page and first["source"]["split"] == "held_out"
    again = run(cli, predictions)[1]
    other = run(cli, predictions, "--seed", "1")[1]
    for name in ("environment",):
        del first[name], again[name]
    assert first == again
    low = [x["groups"][0]["figures"]["auroc"]["low"] for x in (first, other)]
    assert low[0] != low[1]


def test_groups_by_a_column_of_a_table(cli, predictions, tmp_path):
    """Patient 0 is not in the table, and of patient 1 nothing is known; ages fall into quarters."""
    table = {
        "subject_id": list(range(1, 50)),
        "sex": [None, *("F" if i % 2 else "M" for i in range(2, 50))],
        "age": list(range(30, 79)),
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    lines = [
        "subject_id,sex,age",
        *(f"{a},{b or ''},{c}" for a, b, c in zip(*table.values(), strict=True)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    record = run(cli, predictions, "--by", "sex", "--by", "age", "--table", "t.parquet")[1]
    assert sizes(record, "sex") == {"F": (24, 48), "M": (24, 48), "unknown": (2, 4)}
    quarters = sizes(record, "age, in quarters")
    assert sum(rows for _, rows in quarters.values()) == 100 and len(quarters) == 5
    assert quarters["unknown"] == (1, 2) and list(quarters)[0] == "30 to 42"
    of_csv = run(cli, predictions, "--by", "age", "--table", "t.csv")[1]
    assert sizes(of_csv, "age, in quarters") == quarters


def test_groups_by_a_code_know_nothing_of_the_future(cli, predictions, tmp_path):
    """Patients 0 to 9 have a code between their two rows, 10 to 19 on the day of the first.

    Patient 20 has it as a static fact, 21 after the last row, and 22 is not among the events.
    """
    rows = [(i, 2 * i * DAY + DAY // 2, "ICU//A") for i in range(10)]
    rows += [(i, 2 * i * DAY, "ICU//B") for i in range(10, 20)]
    rows += [(20, None, "ICU//A"), (21, 200 * DAY, "ICU//A")]
    rows += [(i, 0, "OTHER") for i in range(50) if i != 22]
    write_events(tmp_path / "meds", rows)
    record = run(cli, predictions, "--by", "ICU//*", "--data", "meds:meds")[1]
    found = sizes(record, "code ICU//*")
    assert found["had it"] == (10 + 10 + 1, 10 + 20 + 2)
    assert found["unknown"] == (1, 2)
    assert found["had not"] == (50 - 10 - 1 - 1, 100 - 32 - 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--by", "ward"], "by='ward' is no column, of ['boolean_value'"),
        (["--by", "X//*", "--data", "meds:meds"], "by='X//*': no code of 'meds:meds'"),
        (["--by", "subject_id", "--data", "meds:meds"], "expected only with a code as by"),
        (["--data", "meds:meds"], "data='meds:meds': expected only with by"),
        (["--by", "a", "--data", "text:x"], "data='text:x': expected meds:DIR"),
        (["--by", "a", "--table", "absent.csv"], "cannot be read"),
        (["--by", "a", "--table", "p.parquet"], "has a subject_id twice"),
        (["--by", "a", "--table", "other.csv"], "has none of the patients"),
        (["--by", "a", "--table", "bare.csv"], "has the columns ['x']: expected subject_id"),
        (["--resamples", "9"], "resamples=9: expected at least 100"),
        (["--threshold", "1"], "threshold=1.0: expected 0 < x < 1"),
        (["--by", "a", "--by", "a"], "expected different ones"),
        (["--output", "absent/x.html"], "is no folder"),
    ],
)
def test_bad_arguments_end_with_a_line(args, message, cli, predictions, tmp_path):
    write_events(tmp_path / "meds", [(1, 0, "A")])
    (tmp_path / "other.csv").write_text("subject_id,a\n777,1\n")
    (tmp_path / "bare.csv").write_text("x\n1\n")
    done = cli("evaluate", predictions, *args)
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith("[")]
    assert done.exit_code == 2 and not done.stdout
    assert line.startswith("error: ") and message in line
