"""examples/meds-dev/: an entry as MEDS-DEV reads it, whose commands run on a small MEDS folder."""

from __future__ import annotations

import os
import re
import string
import subprocess

import guides
import pytest
from places import ROOT

for package in ("yaml", "pyarrow", "rich", "typer", "filelock"):
    pytest.importorskip(package)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import typer  # noqa: E402
import yaml  # noqa: E402
from patients import write_labels, write_patients, write_splits  # noqa: E402

ENTRY = ROOT / "examples" / "meds-dev"
MODEL = yaml.safe_load((ENTRY / "model.yaml").read_text())
COMMANDS = {
    (of, mode): command for of, x in MODEL["commands"].items() for mode, command in x.items()
}
# The words that meds-dev-model fills in, as MEDS_DEV.models.model_commands does
ALWAYS = {"dataset_dir", "output_dir", "model_dir", "demo"}
PLACES = {
    ("unsupervised", "train"): ALWAYS,
    ("supervised", "train"): ALWAYS | {"labels_dir", "model_initialization_dir"},
    ("supervised", "predict"): ALWAYS | {"labels_dir", "model_initialization_dir", "split"},
}


def test_the_entry_has_what_meds_dev_asks_for():
    known = MODEL["metadata"]
    assert known.keys() == {"description", "links", "contacts"} and known["contacts"][0]["name"]
    assert COMMANDS.keys() == PLACES.keys()
    for name in ("README.md", "requirements.txt", "refs.bib"):
        assert (ENTRY / name).read_text().strip()


@pytest.mark.parametrize("stage", PLACES, ids="-".join)
def test_its_commands_have_placeholders_and_options_that_exist(stage):
    from clinattn.tools.cli import app

    used = {name for _, name, _, _ in string.Formatter().parse(COMMANDS[stage]) if name}
    assert used <= PLACES[stage] and {"dataset_dir", "output_dir"} <= used
    of_clinattn = COMMANDS[stage].partition("&&")[0]
    program, name, *_ = of_clinattn.split()
    command = typer.main.get_command(app).commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert program == "clinattn"
    assert set(re.findall(r"(?<!\S)--[a-z-]+", of_clinattn)) <= options


def test_its_commands_run_one_after_the_other(tmp_path):
    """The commands as meds-dev-model runs them in modes "full", on labels with columns of ACES."""
    meds = write_patients(tmp_path / "a meds folder", patients=60)
    splits = {p: ("train", "train", "tuning", "held_out")[p % 4] for p in range(1, 61)}
    write_splits(meds, splits)
    rows = pq.read_table(meds / "data" / "0.parquet").to_pylist()
    alarmed = {row["subject_id"] for row in rows if row["code"].startswith("ALARM")}
    nothing = {
        "integer_value": pa.int64(),
        "float_value": pa.float64(),
        "categorical_value": pa.string(),
    }
    for split in ("train", "tuning", "held_out"):
        of = [(p, 8, p in alarmed) for p, own in splits.items() if own == split]
        absent = {name: pa.nulls(len(of), kind) for name, kind in nothing.items()}
        write_labels(tmp_path / "labels" / split / "0.parquet", of, **absent)
    given = {"dataset_dir": meds, "labels_dir": tmp_path / "labels", "model_dir": ENTRY}
    programs = guides.write_programs(tmp_path / "programs")
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    for stage, command in COMMANDS.items():
        output = tmp_path / "-".join(stage)
        output.mkdir()
        rendered = command.format(**given, output_dir=output, split="held_out", demo=True)
        script = output / "cmd.sh"
        script.write_text(f"#!/bin/bash\nset -e\n{rendered}")
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        given["model_initialization_dir"] = output
    table = pq.read_table(output / "predictions.parquet")
    assert table.schema.field("predicted_boolean_probability").type == pa.float64()
    held_out = [p for p, own in splits.items() if own == "held_out"]
    assert table["subject_id"].to_pylist() == held_out
    assert table["boolean_value"].to_pylist() == [p in alarmed for p in held_out]
