"""Files of weights in folders of transformers: safetensors, pickles, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from encoder_families import make_theirs
from safetensors.torch import load_file

from clinattn.encoder import Encoder, MaskedLanguageModel

OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_pickle_gives_the_same_model(name, zipped, tmp_path):
    """A file as published before safetensors; norms have the names that TensorFlow gave them."""
    theirs = make_theirs(name, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    expected = MaskedLanguageModel.from_pretrained(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for new, old in OLD_NAMES.items():
        tensors = {key.replace(new, old): x for key, x in tensors.items()}
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    found = MaskedLanguageModel.from_pretrained(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert torch.equal(found[key], x), key
    shutil.move(path, tmp_path / "a.bin")
    index = {"weight_map": dict.fromkeys(tensors, "a.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert MaskedLanguageModel.from_pretrained(tmp_path).state_dict().keys() == expected.keys()


class Planted:
    """Code that a pickle would run."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_theirs("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"pooler.dense.weight": Planted()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin .* could run code and is not read"):
        Encoder.from_pretrained(tmp_path)
    assert not Path("ran").exists()
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: expected tensors by name"):
        Encoder.from_pretrained(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path):
    make_theirs("bert").save_pretrained(tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    index = {"weight_map": {"pooler.dense.weight": "a.safetensors", "other": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a.safetensors: expected the tensors \['other'\]"):
        Encoder.from_pretrained(tmp_path)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a local folder; nothing is downloaded"):
        Encoder.from_pretrained("emilyalsentzer/Bio_ClinicalBERT")
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        Encoder.from_pretrained(tmp_path)
    make_theirs("bert").save_pretrained(tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged, or holds more than tensor"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or pytorch_model.bin"):
        Encoder.from_pretrained(tmp_path)
    index = {"weight_map": {"embeddings.word_embeddings.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="'../model.safetensors' is no file beside it"):
        Encoder.from_pretrained(tmp_path)


def test_without_safetensors_one_line_says_what_to_install(tmp_path, monkeypatch):
    make_theirs("bert").save_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'clinattn\[integrations\]'"):
        Encoder.from_pretrained(tmp_path)
