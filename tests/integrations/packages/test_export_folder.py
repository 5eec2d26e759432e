"""The folder of clinattn export in transformers: the same classes, weights and logits."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

for package in ("pyarrow", "rich", "typer"):
    pytest.importorskip(package)

from made_checkpoints import MODERN, write_made  # noqa: E402
from support import assert_close  # noqa: E402

from clinattn.encoder import EncoderConfig  # noqa: E402
from clinattn.tools.exporting.export import export  # noqa: E402
from clinattn.tools.exporting.settings import ExportSettings  # noqa: E402
from clinattn.training.checkpoint import load_model, save_checkpoint  # noqa: E402

SHAPE = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "num_layers": 2}
BERT = EncoderConfig.preset("clinicalbert", vocab_size=60, windows=(), **SHAPE)
LENGTHS = 9, 1, 23


def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 45, (3, 23), generator=generator)
    mask = torch.arange(23) < torch.tensor(LENGTHS)[:, None]
    return ids, mask


@pytest.mark.parametrize("config", [MODERN, BERT], ids=["modernbert", "bert"])
@pytest.mark.parametrize("task", ["classify", "mlm"])
def test_transformers_loads_the_folder(config, task, tmp_path):
    path = write_made(tmp_path / "run", config, task)
    list(export(ExportSettings(str(path), output=tmp_path / "out"), lambda *_: None))
    name = "SequenceClassification" if task == "classify" else "MaskedLM"
    kind = getattr(transformers, f"AutoModelFor{name}")
    theirs, about = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(about[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if task == "classify":
        assert theirs.config.id2label == {0: "absent", 1: "present"}
    ids, mask = inputs()
    mine = load_model(path)[0]
    exact = load_model(path)[0].double()
    with torch.no_grad():
        found = mine(ids, attention_mask=mask).logits
        truth = exact(ids, attention_mask=mask).logits
        naive = theirs.eval()(ids, attention_mask=mask.long()).logits
    if task == "mlm":
        found, truth, naive = (x[mask] for x in (found, truth, naive))
    # each is within the other's error of the exact logits
    assert_close("ours", found, truth, naive)
    assert_close("theirs", naive, truth, found)


def test_a_folder_of_transformers_becomes_a_program(tmp_path):
    path = write_made(tmp_path / "run", MODERN)
    list(export(ExportSettings(str(path), output=tmp_path / "out"), lambda *_: None))
    for folder in (path, tmp_path / "out"):
        settings = ExportSettings(str(folder), torch_export=tmp_path / "m.pt2")
        list(export(settings, lambda *_: None))
        program = torch.export.load(tmp_path / "m.pt2").module()
        ids, ends = torch.arange(5, 17), torch.tensor([0, 5, 12], dtype=torch.int32)
        logits = program(ids, ends)
        if folder is path:
            first = logits
    torch.testing.assert_close(logits, first, rtol=0, atol=0)
    with pytest.raises(ValueError, match="is a folder of transformers already"):
        settings = ExportSettings(str(tmp_path / "out"), output=tmp_path / "again")
        list(export(settings, lambda *_: None))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["architectures"] = ["ModernBertModel"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architectures=.*ModernBertModel.*expected one of"):
        list(
            export(
                ExportSettings(str(tmp_path / "out"), torch_export=tmp_path / "x.pt2"),
                lambda *_: None,
            )
        )


def test_the_tokenizer_of_a_checkpoint_goes_along(tmp_path):
    """transformers makes of a text the ids that training makes, and pads a batch."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fever", "and", "cough"]
    ids = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(words[:5])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = write_made(tmp_path / "run", MODERN)
    state = torch.load(path, weights_only=True)
    del state["sha256"]
    path = save_checkpoint(path.parent, state | {"tokenizer": made.to_str()}, keep=1)
    list(export(ExportSettings(str(path), output=tmp_path / "out"), lambda *_: None))
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = found(["fever and rash", "cough"], padding=True)
    assert batch["input_ids"] == [[2, 5, 6, 1, 3], [2, 7, 3, 0, 0]]
    assert (found.mask_token, found.unk_token) == ("[MASK]", "[UNK]")
    assert "by the tokenizer of this folder" in (tmp_path / "out" / "README.md").read_text()
