"""The command line, through typer's own runner."""

from __future__ import annotations

import json

import pytest
from terminal import flat

for package in ("typer", "rich", "pyarrow", "matplotlib"):
    pytest.importorskip(package)

FAST = ["--max-tokens", "48", "--sequences", "4", "--batch-size", "2", "--rounds", "1"]


def test_bench_writes_everything_and_prints_the_speedup(cli, meds, tmp_path):
    done = cli("bench", "--meds-dir", meds, "--output", "res", *FAST)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "res").iterdir()} >= {
        "results.json",
        "report.html",
        "throughput.png",
        "throughput.svg",
    }
    assert "training: " in done.stdout
    assert "times by packing alone (clinattn, packed, over clinattn, padded)" in done.stdout
    assert "round 1" in done.stderr and "round 1" not in done.stdout
    result = json.loads((tmp_path / "res" / "results.json").read_text())
    assert result["workload"]["source"] == "MEDS folder my_meds, 5 patients"
    assert result["workload"]["sequences"] == 4
    assert str(tmp_path) not in json.dumps(result)  # a result may be published


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--meds-dir", "absent"], "meds_dir='absent' does not exist: expected a MEDS folder"),
        (["--meds-dir", "."], "meds_dir='.' has no data/**/*.parquet"),
        (["--profile", "icu"], "profile='icu' is unknown: expected one of"),
        (["--preset", "bert"], "preset='bert': expected one of"),
        (["--modes", "train,tune"], "modes=('train', 'tune'): expected some of"),
        (["--dtype", "int8"], "dtype='int8': expected one of"),
        (["--device", "tpu"], "device='tpu': expected one of ('cpu', 'cuda')"),
        (
            ["--meds-dir", ".", "--profile", "fixed"],
            "--meds-dir and --profile: got both, expected",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_bench_arguments_end_with_a_clear_line(cli, options, message):
    done = cli("bench", *options)
    assert done.exit_code == 2
    assert message in flat(done.stderr) and "Traceback" not in done.output


def test_report_is_made_from_the_json_alone(cli, meds, tmp_path):
    cli("bench", "--meds-dir", meds, "--output", "res", "--modes", "infer", *FAST)
    written = (tmp_path / "res" / "report.html").read_text()
    (tmp_path / "res" / "results.json").rename(tmp_path / "moved.json")
    assert cli("report", "moved.json").exit_code == 0
    assert (tmp_path / "report.html").read_text() == written
    assert cli("report", "moved.json", "--output", "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text() == written


def test_report_of_garbage_ends_with_a_clear_line(cli, tmp_path):
    done = cli("report", "absent.json")
    assert done.exit_code == 2 and "results='absent.json' cannot be read" in flat(done.stderr)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_profile_writes_a_trace(cli, tmp_path, mode):
    done = cli(
        "profile", "--mode", mode, "--max-tokens", 40, "--batch-size", 2, "--steps", 1,
        "--output", "traces",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    trace = json.loads((tmp_path / "traces" / f"clinattn_packed-{mode}.trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any("mm" in name or "cpu_linear" in name for name in names)
    assert "Self CPU" in done.stdout
    passes = ("forward", "backward") if mode == "train" else ("forward",)
    for one in passes:
        assert f"layer 0 {one}" in done.stdout and f"attention {one}, " in done.stdout
    assert ("backward" in done.stdout) == (mode == "train")


def test_profile_names_a_wrong_variant(cli):
    done = cli("profile", "--variant", "eager")
    assert done.exit_code == 2 and "variant='eager': expected one of" in flat(done.stderr)
