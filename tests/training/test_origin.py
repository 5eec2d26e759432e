"""The origin of a model by its path: a file, the folder of a run, or a folder of transformers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from runs import small_run  # noqa: E402

from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.origin import resolve  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_presets")


@pytest.fixture
def run(tmp_path):
    """The folder of a run with checkpoints of steps 1 and 2."""
    folder = write_patients(tmp_path / "meds")
    output = tmp_path / "out"
    Trainer(small_run(meds_dir=folder, output=output, steps=2, save_every=1)).run()
    return output


def test_a_file_is_itself_and_a_run_its_newest(run):
    first = resolve(run / "step-00000001.pt")
    assert first.path.name == "step-00000001.pt" and first.saved["step"] == 1
    newest = resolve(str(run))
    assert newest.path.name == "step-00000002.pt" and newest.saved["step"] == 2
    assert newest.damaged == ()


def test_a_damaged_checkpoint_is_passed_over_and_named(run):
    (run / "step-00000002.pt").write_bytes(b"torn")
    origin = resolve(run)
    assert origin.saved["step"] == 1
    (message,) = origin.damaged
    assert "step-00000002.pt' cannot be read" in message
    (run / "step-00000001.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="init='.*out' holds no checkpoint that is intact: .*0002"):
        resolve(run, "init")


def test_a_folder_with_a_config_is_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    origin = resolve(tmp_path)
    assert origin.saved is None and origin.path == tmp_path


def test_what_is_neither_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="checkpoint 'absent' cannot be read: No such file"):
        resolve("absent")
    with pytest.raises(ValueError, match=r"init='.*meds' holds neither step-\*.pt nor config.json"):
        resolve(tmp_path / "meds", "init")
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds both config.json and step-00000002.pt: expected"):
        resolve(run)


def test_a_run_starts_from_the_folder_of_another(run, tmp_path):
    (run / "step-00000002.pt").write_bytes(b"torn")
    lines: list[str] = []
    settings = small_run(meds_dir=tmp_path / "meds", output=tmp_path / "tuned", init=run)
    trainer = Trainer(settings, say=lines.append)
    (line,) = lines
    assert "step-00000002.pt'" in line and "starting from step-00000001.pt" in line
    first = resolve(run).saved["model"]["encoder.embeddings.tokens.weight"]
    assert torch.equal(trainer.model.encoder.embeddings.tokens.weight, first)
