"""clinattn predict with folders of transformers: what their own classes and tokenizers give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

for package in ("transformers", "tokenizers", "pyarrow", "rich", "typer"):
    pytest.importorskip(package)

import pyarrow.parquet as pq  # noqa: E402
from predicted import bits_of, facts_of, trained  # noqa: E402
from small_folders import CLASSES, MOST, configured, save, save_families, tokenizer  # noqa: E402
from terminal import flat  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402
from clinattn.tools.prediction.job import read_job  # noqa: E402
from clinattn.tools.prediction.models import PackedModel, PaddedModel  # noqa: E402
from clinattn.tools.prediction.settings import PredictionSettings  # noqa: E402
from clinattn.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

NOTES = [
    f"The patient has {'sepsis and ' * (i % 18)}{'fever' if i % 3 else 'cough'}, no mg."
    for i in range(20)
]

PACKED = ("bert", "modernbert", "several")
BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_families(root)
    electra = configured(ElectraConfig, embedding_size=32)
    save(root / "electra", ElectraForSequenceClassification(electra))
    inner = {f"{side}_{x}": n for side in ("encoder", "decoder") for x, n in BART.items()}
    bart = configured(BartConfig, d_model=32, eos_token_id=3, decoder_start_token_id=3, **inner)
    save(root / "bart", BartForSequenceClassification(bart))
    save(root / "fnet", FNetForSequenceClassification(configured(FNetConfig)))
    without = configured(GPT2Config, pad_token_id=None, n_positions=64, n_inner=48)
    save(root / "gpt2", GPT2ForSequenceClassification(without))
    rows = [{"text": text, "label": CLASSES[i % 3]} for i, text in enumerate(NOTES)]
    (root / "n.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def cli(folders, tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.chdir(tmp_path)
    given = ["--data", f"text:{folders / 'n.jsonl'}"]
    return lambda *args: CliRunner().invoke(app, ["predict", *map(str, args), *given])


def expected(folders, name):
    """Logits and means of the last states of transformers, one by one, and of windows."""
    classifies = name != "encoder"
    kind = AutoModelForSequenceClassification if classifies else AutoModel
    model = kind.from_pretrained(folders / name).eval()
    fast = PreTrainedTokenizerFast.from_pretrained(folders / name)
    found = []
    for text in NOTES:
        cut = {"truncation": True, "max_length": MOST, "stride": round(0.25 * (MOST - 2))}
        windows = fast(text, return_overflowing_tokens=True, **cut)["input_ids"]
        with torch.inference_mode():
            parts = [model(torch.tensor([x]), output_hidden_states=True) for x in windows]
        logits = torch.stack([x.logits[0] for x in parts]).mean(0) if classifies else None
        kind = "encoder_hidden_states" if name == "bart" else "hidden_states"
        states = torch.cat([x[kind][-1][0] for x in parts])
        found.append((logits, states.mean(0)))
    return found


@pytest.mark.parametrize("name", [*PACKED, "electra", "gpt2", "bart", "fnet"])
def test_predictions_are_those_of_transformers(cli, folders, tmp_path, name):
    done = cli(folders / name, "--output", "p.parquet", "--embeddings", "e.parquet")
    assert done.exit_code == 0, done.output
    logits, means = (torch.stack(x) for x in zip(*expected(folders, name), strict=True))
    table = pq.read_table(tmp_path / "p.parquet")
    p = np.stack([table[f"probability_{x}"].to_numpy() for x in CLASSES], 1)
    own = logits.sigmoid() if name == "several" else logits.softmax(-1)
    np.testing.assert_allclose(p, own, rtol=1e-4, atol=1e-6)
    states = np.stack(pq.read_table(tmp_path / "e.parquet")["embedding"].to_numpy())
    np.testing.assert_allclose(states, means, rtol=1e-4, atol=1e-4)
    assert table["label"].to_pylist() == [CLASSES[i % 3] for i in range(len(NOTES))]
    facts = facts_of(tmp_path / "p.parquet")
    assert facts["checkpoint"]["name"] == name and facts["independent"] == (name == "several")


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders_that_clinattn_has_give_the_same_bits_in_any_batch(cli, folders, tmp_path, name):
    for tokens in (1, 60, 9999):
        given = ["--output", f"p{tokens}", "--embeddings", f"e{tokens}", "--batch-tokens", tokens]
        assert cli(folders / name, *given).exit_code == 0
    for kind in "pe":
        one, *others = (bits_of(tmp_path / f"{kind}{tokens}") for tokens in (1, 60, 9999))
        assert all(one.equals(other) for other in others)


def test_families_are_packed_and_others_padded(folders, tmp_path):
    def model(name):
        data = f"text:{folders / 'n.jsonl'}"
        given = PredictionSettings(str(folders / name), data=data, output=tmp_path / "p.parquet")
        return read_job(given).model

    for name in ("bert", "modernbert"):
        assert isinstance(model(name), PackedModel)
    electra, gpt2 = model("electra"), model("gpt2")
    assert isinstance(electra, PaddedModel) and isinstance(gpt2, PaddedModel)
    assert electra.batches([3, 9, 8], 16) == [[1], [2, 0]]
    fnet = model("fnet")
    assert not fnet.masked and not fnet.states and fnet.batches([3, 9], 99) == [[0], [1]]
    assert gpt2.batches([3, 9, 8], 99) == [[0], [1], [2]]


def test_a_model_without_a_head_has_embeddings(cli, folders, tmp_path):
    done = cli(folders / "encoder", "--embeddings", "e.parquet")
    assert done.exit_code == 0, done.output
    states = np.stack(pq.read_table(tmp_path / "e.parquet")["embedding"].to_numpy())
    means = torch.stack([mean for _, mean in expected(folders, "encoder")])
    np.testing.assert_allclose(states, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("encoder", ["--output", "p"], "has the architecture BertModel: expected one ForSeq"),
        ("bert", ["--output", "p", "--tokenizer", "t.json"], "has its tokenizer: expected no"),
        ("bert", ["--output", "p", "--split", "train"], "split='train': expected 'all' for a"),
        ("none", ["--output", "p"], "has no weights: expected one of"),
    ],
)
def test_bad_folders_are_one_line(cli, folders, tmp_path, name, options, message):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text((folders / "bert" / "config.json").read_text())
    place = folders / name if (folders / name).is_dir() else name
    done = cli(place, *options)
    assert done.exit_code == 2 and message in flat(done.stderr)


def test_a_checkpoint_has_its_tokenizer_and_an_older_one_needs_it(
    cli, folders, tmp_path, small_presets
):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    given = {"tokenizer": tmp_path / "tokenizer.json", "max_tokens": 20, "label_code": None}
    path = trained(tmp_path / "o", text_file=folders / "n.jsonl", **given)[1]
    done = cli(path, "--output", "p.parquet", "--split", "all")
    assert done.exit_code == 0, done.output
    assert pq.read_table(tmp_path / "p.parquet").num_rows == len(NOTES)
    older = {k: v for k, v in load_checkpoint(path).items() if k != "tokenizer"}
    older = save_checkpoint(tmp_path / "o", older | {"step": 1}, keep=9)
    done = cli(older, "--output", "q.parquet", "--split", "all")
    assert done.exit_code == 2 and "which is no word: expected the tokenizer.json" in done.stderr
    done = cli(older, "--output", "q.parquet", "--split", "all", "--tokenizer", "tokenizer.json")
    assert done.exit_code == 0, done.output
