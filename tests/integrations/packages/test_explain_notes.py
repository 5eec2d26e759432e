"""clinattn explain on notes: folders of transformers, and checkpoints of a tokenizer.json."""

from __future__ import annotations

import json

import pytest
import torch

for package in ("transformers", "tokenizers", "jinja2", "rich", "typer"):
    pytest.importorskip(package)

from pages import barriers, read  # noqa: E402
from runs import small_run  # noqa: E402
from small_folders import CLASSES, MOST, WORDS, save_families, tokenizer  # noqa: E402
from terminal import flat  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    BertForSequenceClassification,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402
from clinattn.tools.explanation import explain  # noqa: E402
from clinattn.tools.explanation.page import render  # noqa: E402
from clinattn.tools.explanation.settings import METHODS, ExplainSettings  # noqa: E402
from clinattn.training.checkpoint import checkpoints, checksum, load_checkpoint  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.start import make_corpus  # noqa: E402

TEXT = "The patient has sepsis and <b>fever</b>, no cough. \n" * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_families(root)
    (root / "n.txt").write_text(TEXT)
    return root


def case_of(folders, name, **known):
    settings = ExplainSettings(str(folders / name), text=folders / "n.txt", **known)
    return settings, explain.read_case(settings)


@pytest.mark.parametrize("name", ["bert", "modernbert", "several"])
def test_the_prediction_is_that_of_the_model_and_its_tokenizer(folders, name):
    _, case = case_of(folders, name)
    load = {"modernbert": ModernBertForSequenceClassification}
    model = load.get(name, BertForSequenceClassification).from_pretrained(folders / name).eval()
    fast = PreTrainedTokenizerFast.from_pretrained(folders / name)
    inputs = fast(TEXT, truncation=True, max_length=MOST, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
    everything = torch.arange(len(case.of_token))
    torch.testing.assert_close(case.model.logits([everything])[0].float(), logits)
    each = logits.sigmoid() if name == "several" else logits.softmax(-1)
    found = case.probabilities(case.model.logits([everything]))[0]
    torch.testing.assert_close(found.float(), each)
    assert case.model.classes == CLASSES


def test_sub_words_are_words_with_places(folders):
    _, case = case_of(folders, "bert")
    words = TEXT.replace("<b>", " < b > ").replace("</b>", " < / b > ")
    words = words.replace(",", " , ").replace(".", " . ").split()
    *whole, last = (unit.name for unit in case.units)
    assert whole == words[: len(whole)] and last == "seps"  # of whose tokens one was read
    assert "sepsis" in [unit.name for unit in case.units]
    assert [unit.known for unit in case.units if unit.name == "<"][0] is False
    assert case.of_token[0] == case.of_token[-1] == -1 and len(case.of_token) == MOST
    assert "reads the first" in case.warnings[0]
    kept = case.without(torch.tensor([3]))  # sepsis, of two tokens
    assert len(kept) == MOST - 2 and {0, MOST - 1} <= set(kept.tolist())


def test_removals_are_batches_of_equal_length(folders):
    _, case = case_of(folders, "bert")
    kept = [case.without(torch.tensor(x)) for x in ([0], [3], [1, 2], [5], [3])]
    alone = torch.cat([case.model.logits([x]) for x in kept])
    torch.testing.assert_close(case.model.logits(kept), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_serves(folders, name, method):
    settings, case = case_of(folders, name, methods=(method,), target="maybe", draws=2)
    record = explain.explained(case, settings, lambda *_: None)
    assert sum(abs(unit["scores"][0]) for unit in record["units"]) == pytest.approx(1)
    html = render(record, case)
    assert barriers(html) == [] and "Why “maybe”?" in read(html).all("h1")[0].text


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["explain", *(str(x) for x in args)])


def test_a_folder_is_explained_as_a_command(cli, folders, tmp_path):
    done = cli(folders / "bert", "--text", folders / "n.txt", "--output", "p.html")
    assert done.exit_code == 0, done.output
    assert "sepsis" in done.stdout and (tmp_path / "p.html").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("encoder", [], "has the architecture BertModel: expected one ForSequenceClassification"),
        ("bert", ["--target", "x"], "target='x': expected one of ['no', 'yes', 'maybe']"),
        ("bert", ["--tokenizer", "t.json"], "has its tokenizer: expected no other"),
    ],
)
def test_bad_folders_are_one_line(cli, folders, name, options, message):
    done = cli(folders / name, "--text", folders / "n.txt", *options)
    assert done.exit_code == 2 and message in flat(done.stderr)


def test_a_folder_without_weights_is_refused(cli, folders, tmp_path):
    (tmp_path / "config.json").write_text((folders / "bert" / "config.json").read_text())
    done = cli(".", "--text", folders / "n.txt")
    assert done.exit_code == 2 and "has no weights: expected one of" in done.stderr


def test_a_checkpoint_of_a_tokenizer_has_it(cli, tmp_path, small_presets):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    rows = [{"text": TEXT if i % 2 else "no cough, no fever.", "label": i % 2} for i in range(40)]
    rows = [{**row, "subject_id": i} for i, row in enumerate(rows)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"tokenizer": tmp_path / "tokenizer.json", "max_tokens": 20, "steps": 1}
    settings = small_run(
        "classify", text_file=tmp_path / "t.jsonl", label_code=None, output=tmp_path / "o", **given
    )
    Trainer(settings).run()
    (tmp_path / "n.txt").write_text(TEXT)
    path = checkpoints(tmp_path / "o")[-1]
    known = {"text": tmp_path / "n.txt"}
    case = explain.read_case(ExplainSettings(str(path), **known))
    corpus = make_corpus(settings, None)
    seen = {tuple(x.ids.tolist()) for x in (*corpus.train, *corpus.held_out)}
    read = case.model.example.ids.tolist()
    assert tuple(read) in seen and read[-1] == WORDS.index("[SEP]")
    assert "sepsis" in [unit.name for unit in case.units] and case.of_token[-1] == -1
    assert "the first of" in case.facts["window"]

    older = load_checkpoint(path)  # as it was before checkpoints had their tokenizer
    del older["tokenizer"], older["architecture"], older["settings"]["pool"]
    torch.save(older | {"sha256": checksum(older)}, tmp_path / "older.pt")
    done = cli("older.pt", "--text", "n.txt")
    assert done.exit_code == 2 and "which is no word: expected the tokenizer.json" in done.stderr
    known["tokenizer"] = tmp_path / "tokenizer.json"
    case = explain.read_case(ExplainSettings(str(tmp_path / "older.pt"), **known))
    read = case.model.example.ids.tolist()
    assert len(read) == 20 and read[-1] != WORDS.index("[SEP]") and "window" not in case.facts
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.add_tokens(["ward"])
    other.save(str(tmp_path / "other.json"))
    done = cli(path, "--text", "n.txt", "--tokenizer", "other.json")
    assert done.exit_code == 2 and "has other tokens than the checkpoint" in done.stderr
