"""clinattn train as a command: its lines and its exit codes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from terminal import flat  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402

FAST = ["--max-tokens", "48", "--batch-tokens", "96", "--steps", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("meds"))


@pytest.fixture
def cli(tmp_path, monkeypatch, threads):
    """Run a command in an empty folder, with no MEDS folder in the environment."""
    threads(1)
    for name in ("MEDS_DIR", "CLINATTN_MEDS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *args, **env: CliRunner().invoke(app, [str(arg) for arg in args], env=env)


def test_a_run_says_what_it_reads_and_how_it_goes(cli, folder, tmp_path):
    done = cli("train", "--meds-dir", folder, *FAST)
    assert done.exit_code == 0, done.output
    said = flat(done.stderr)
    assert "40 patients" in said and "to evaluate; tiny" in said
    assert "step 0: held-out loss" in said and "step 3: held-out loss" in said
    assert "unigram entropy" in said and done.stdout == ""
    assert "wrote train/out/metrics.jsonl and checkpoints up to step 3" in said
    again = cli("train", "--meds-dir", folder, *FAST)
    assert again.exit_code == 2 and "expected resume, or another folder" in flat(again.stderr)
    assert cli("train", "--meds-dir", folder, *FAST, "--resume").exit_code == 0


def test_a_classifier_is_held_against_the_base_rate(cli, folder):
    labels = ["--task", "classify", "--label-code", "ALARM*", "--output", "o"]
    done = cli("train", *labels, *FAST, MEDS_DIR=str(folder))
    assert done.exit_code == 0, done.output
    for name in ("accuracy", "base rate", "auroc"):
        assert name in flat(done.stderr)


def test_pairs_are_held_against_the_base_rate(cli, folder):
    done = cli("train", "--meds-dir", folder, "--nsp", *FAST)
    assert done.exit_code == 0, done.output
    assert "nsp accuracy" in flat(done.stderr) and "nsp base rate" in flat(done.stderr)


def test_a_text_file_wins_over_the_environment(cli, folder, tmp_path):
    rows = [{"text": f"note {i % 7} of {i % 3}", "subject_id": i} for i in range(60)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = cli("train", "--text", "notes.jsonl", *FAST, MEDS_DIR=str(folder))
    assert done.exit_code == 0 and "notes.jsonl, 60 rows" in flat(done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "data: got none, expected meds:DIR, meds-torch:DIR, text:FILE or profile:NAME"),
        (["--meds-dir", "absent"], "meds_dir='absent' does not exist: expected a MEDS folder"),
        (["--meds-dir", ".", "--text", "a.csv"], "got both, expected exactly one of them"),
        (["--text", "absent.csv"], "text_file='absent.csv' cannot be read"),
        (["--meds-dir", ".", "--task", "nsp"], "task='nsp': expected one of"),
        (["--meds-dir", ".", "--task", "classify"], "label_code and labels: got neither"),
        (["--meds-dir", ".", "--preset", "bert"], "preset='bert': expected one of"),
        (["--meds-dir", ".", "--nsp", "--task", "clm"], "nsp=True: expected False for task='clm'"),
        (["--text", "a.csv", "--preset", "clmbr"], "preset='clmbr' asks for times, which text_fil"),
        (["--meds-dir", ".", "--steps", "0"], "steps=0: expected at least 1"),
        (["--meds-dir", ".", "--resume"], "resume: output='train/out' holds no checkpoint"),
        (["--meds-dir", ".", "--init", "no.pt"], "checkpoint 'no.pt' cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_a_clear_line_and_no_folder(cli, tmp_path, options, message):
    done = cli("train", *options)
    assert done.exit_code == 2 and message in flat(done.stderr), done.output
    assert "Traceback" not in done.output and not (tmp_path / "train").exists()


def test_accumulation_is_shared_out_evenly(folder, tmp_path):
    from clinattn.training.loop import Trainer
    from clinattn.training.ranks import Ranks
    from clinattn.training.settings import TrainingSettings

    settings = TrainingSettings(meds_dir=folder, output=tmp_path, accumulate=3)
    with pytest.raises(ValueError, match="accumulate=3: expected a multiple of the 2 ranks"):
        Trainer(settings, Ranks(1, 2))
