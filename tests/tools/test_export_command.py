"""clinattn export as a command: the folder, its card, and errors before anything is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

for package in ("pyarrow", "jinja2", "rich", "typer", "safetensors"):
    pytest.importorskip(package)

from made_checkpoints import CLASSES, CODES, MODERN, write_made  # noqa: E402
from predictions import drawn, evaluate_file, write_binary  # noqa: E402

from clinattn.encoder import (  # noqa: E402
    CausalLanguageModel,
    MaskedLanguageModel,
    SequenceClassifier,
)
from clinattn.tools.exporting import card  # noqa: E402
from clinattn.tools.exporting.model import read_model  # noqa: E402
from clinattn.training.checkpoint import (  # noqa: E402
    load_checkpoint,
    load_model,
    save_checkpoint,
)

TIMED = replace(MODERN, positions="rotary_time", numeric_values=True)
CAUSAL = replace(MODERN, causal=True, pooling="last")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_weights_vocabulary_and_a_card(cli, tmp_path):
    path = write_made(tmp_path / "run", MODERN, label_code="ALARM*")
    rows = [
        {"step": 5, "split": "held_out", "loss": 0.9},
        {"step": 7, "split": "held_out", "loss": 0.4321, "auroc": None},
        {"step": 7, "split": "train", "loss": 0.1},
        {"step": 8, "split": "held_out", "loss": 0.2},
    ]
    (path.parent / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"st')
    done = cli("export", "run", "--output", "out", "--data-title", "Made | up")
    assert done.exit_code == 0, done.output
    assert "wrote out, a folder of modernbert" in done.stdout
    out = tmp_path / "out"
    names = ["README.md", "clinattn.json", "config.json", "model.safetensors", "vocabulary.json"]
    assert files(out) == names and files(tmp_path) == ["out", "run"]
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "absent", "1": "present"}
    vocabulary = json.loads((out / "vocabulary.json").read_text())
    assert vocabulary["[PAD]"] == 0 and len(vocabulary) == 5 + len(CODES)
    text = (out / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: transformers\n(.+\n)+---\n\n# ", text)
    for part in ("Made \\| up", "`ALARM*`", "0.4321", "must not be used", "hardware", "`absent`"):
        assert part in text, part
    assert "AutoModelForSequenceClassification" in text and "0.2\n" not in text
    assert str(tmp_path) not in "".join(
        x.read_text() for x in out.iterdir() if x.suffix != ".safetensors"
    )


@pytest.mark.parametrize(
    ("config", "task", "kind"),
    [
        (MODERN, "classify", SequenceClassifier),
        (TIMED, "classify", SequenceClassifier),
        (CAUSAL, "classify", SequenceClassifier),
        (CAUSAL, "clm", CausalLanguageModel),
        (TIMED, "mlm", MaskedLanguageModel),
    ],
    ids=["modernbert", "timed with values", "causal", "next token", "masked with values"],
)
def test_the_loader_of_the_card_gives_the_same_weights(config, task, kind, cli, tmp_path):
    path = write_made(tmp_path / "run", config, task)
    done = cli("export", path, "--output", "out")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    code = re.findall(r"```python\n(from clinattn.*?)\n```", text, re.S)
    scope: dict = {}
    exec(code[0], scope)
    mine, theirs = scope["model"].state_dict(), load_model(path)[0].state_dict()
    assert isinstance(scope["model"], kind) and scope["model"].encoder.config == config
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    alone = config is not MODERN
    assert ("transformers cannot load" in text) == alone
    assert ("no model type of transformers has this shape" in done.stdout) == alone


def test_values_have_their_scales_in_the_folder(cli, tmp_path):
    write_made(tmp_path / "run", TIMED)
    assert cli("export", "run", "--output", "out").exit_code == 0
    reading = json.loads((tmp_path / "out" / "clinattn.json").read_text())
    assert reading["values"]["mean"][:2] == [None, None] and reading["values"]["scale"][0] == 1
    assert reading["classes"] == CLASSES and "data" not in reading["settings"]


def test_a_model_of_a_number_has_its_scale_in_the_folder(cli, tmp_path):
    target = {"column": "float_value", "mean": 3.5, "scale": 2.0}
    write_made(tmp_path / "run", MODERN, target=target)
    done = cli("export", "run", "--output", "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "clinattn.json").read_text())["target"] == target
    text = (tmp_path / "out" / "README.md").read_text()
    assert "predicts a number" in text and "import SequenceClassifier\n" in text
    assert SequenceClassifier.from_pretrained(tmp_path / "out").classifier.out_features == 1
    assert type(read_model("run").with_sdpa()) is SequenceClassifier


def test_the_card_has_the_privacy_that_was_spent(cli, tmp_path):
    path = write_made(tmp_path / "run", MODERN)
    privacy = {"epsilon": 7.9912, "delta": 0.00117189, "unit": "patient"}
    save_checkpoint(path.parent, load_checkpoint(path) | {"privacy": privacy}, keep=1)
    for name, said in (("run", True), ("other", False)):
        write_made(tmp_path / "other", MODERN)
        assert cli("export", name, "--output", f"{name}-out").exit_code == 0
        text = (tmp_path / f"{name}-out" / "README.md").read_text()
        assert ("privacy: epsilon 7.99 (delta 0.00117, unit patient)" in text) == said


def test_what_is_left_out_is_said(cli, tmp_path):
    """The head of next sentences has no place there; a damaged checkpoint is passed over."""
    run = tmp_path / "run"
    write_made(run, MODERN, "mlm", nsp=True)
    (run / "step-00000009.pt").write_bytes(b"no")
    done = cli("export", "run", "--output", "out")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert "whether a text follows another is left out" in done.stdout
    assert (
        "is left out" in text
        and "step-00000009" in done.stdout
        and "step-00000009" in text.replace("\\", "")
    )


def test_the_card_has_the_evaluation_of_this_checkpoint_alone(cli, tmp_path):
    import hashlib

    path = write_made(tmp_path / "run", MODERN)
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, sha256 in (("own", own), ("other", "0" * 64)):
        facts = {"split": "held_out", "checkpoint": {"name": path.name, "sha256": sha256}}
        file = write_binary(tmp_path / f"{name}.parquet", *drawn(200, 0), facts=facts)
        record = evaluate_file(file, resamples=100)
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    done = cli("export", "run", "--output", "out", "--evaluation", "own.json")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    area = json.loads((tmp_path / "own.json").read_text())["groups"][0]["figures"]["auroc"]
    assert f"| AUROC | {area['value']:.3f} | {area['low']:.3f} to {area['high']:.3f} |" in text
    done = cli("export", "run", "--output", "out2", "--evaluation", "other.json")
    assert done.exit_code == 2 and "is of another checkpoint" in done.stderr
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "got neither output nor torch_export"),
        (["run", "--output", "full"], "holds x: expected a new or empty folder"),
        (["run", "--output", "full/x"], "is a file: expected a folder"),
        (["absent", "--output", "out"], "cannot be read"),
        (["run", "--output", "out", "--plain"], "plain: expected only with torch_export"),
        (["run", "--torch-export", "x.pt"], "torch_export='x.pt': expected FILE.pt2"),
        (["run", "--torch-export", "no/x.pt2"], "is no folder: expected one"),
        (["run", "--torch-export", "x.pt2", "--data-title", "a"], "data_title: expected only with"),
        (
            ["run", "--output", "out", "--evaluation", "full/x"],
            "expected the JSON of clinattn eval",
        ),
        (["run", "--output", "out", "--evaluation", "no.json"], "cannot be read"),
    ],
)
def test_bad_arguments_end_with_a_line_and_write_nothing(args, message, cli, tmp_path):
    write_made(tmp_path / "run", MODERN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("{}")
    done = cli("export", *args)
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith("[")]
    assert done.exit_code == 2 and line.startswith("error: ") and message in line
    assert files(tmp_path) == ["full", "run"] and files(tmp_path / "full") == ["x"]


def test_a_failure_on_the_way_leaves_no_folder(cli, tmp_path, monkeypatch):
    write_made(tmp_path / "run", MODERN)
    (tmp_path / "out").mkdir()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clinattn.tools.exporting.folder.card", fail)
    done = cli("export", "run", "--output", "out")
    assert done.exit_code == 2 and "No space left" in done.stderr
    assert files(tmp_path) == ["out", "run"] and not files(tmp_path / "out")


def test_names_of_a_card_are_no_markdown():
    assert card.cell("a|b\n<i> [x](y) `c` *d*") == r"a\|b \<i\> \[x\](y) \`c\` \*d\*"
    assert card.span("a`b\nc") == "`a'b c`"
