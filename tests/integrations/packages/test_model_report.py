"""clinattn report-model, through typer's own runner."""

import json
import sys

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("rich")

import torch  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402
from clinattn.tools.model_report.architectures import find  # noqa: E402
from clinattn.tools.model_report.report import lengths_for  # noqa: E402
from clinattn.tools.model_report.settings import ReportSettings  # noqa: E402

FAST = ["--rounds", "1", "--tokens", "17", "--batch-size", "3", "--device", "cpu"]


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Runs the command in an empty folder, and undoes its HF_HUB_OFFLINE."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["report-model", *map(str, args)])


@pytest.fixture
def folder(tmp_path):
    """BERT, with weights; no release can tell so by the name."""
    find("bert").build().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "name", ["bert", "modernbert", "t5", "whisper", "vit", "patchtst", "llama"]
)
def test_a_model_type_is_compared_and_timed(report, name):
    done = report(name, *FAST, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    architecture = find(name)
    assert result["model"] == architecture.model
    assert len(result["replaced"]) == architecture.attentions
    assert result["kept"] == []
    paddings = [p for p in architecture.paddings if p != "none"] or ["none"]
    assert list(result["parity"]) == paddings
    for padding, parity in result["parity"].items():
        assert parity["calls"] == architecture.expected_calls(padding)
        assert 0 < parity["outputs"] <= 1 and 0 < parity["gradients"] <= 1
    for name in ("before", "after"):
        cost = result["cost"][name]
        assert cost["seconds"]["median"] > 0 and cost["tokens_per_s"] > 0
        if sys.platform == "linux":
            assert cost["peak_memory_bytes"] >= 0
    assert result["cost"]["after"]["attention"] == "clinattn"
    assert result["environment"]["transformers"] == transformers.__version__


@pytest.mark.parametrize("options", [[], ["--train"], ["--dtype", "bfloat16"]], ids=" ".join)
def test_a_folder_with_weights(report, folder, options):
    done = report(folder, *FAST, *options)
    assert done.exit_code == 0, done.output
    for words in ("2 attention modules replaced, 0 kept", "2 x BertSelfAttention", "tokens/s"):
        assert words in done.stdout
    assert f"the weights in {folder}" in done.stdout
    assert done.stdout.endswith("passed\n")
    assert "compare" in done.stderr


def test_the_weights_are_those_of_the_folder(folder):
    from clinattn.tools.model_report.source import load_model

    model, _ = load_model(str(folder))
    expected = find("bert").build().state_dict()
    assert not model.training
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


HEADS = [
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertForMultipleChoice"),
    ("llama", "LlamaForCausalLM"),
    ("llama", "LlamaForSequenceClassification"),
    ("t5", "T5ForConditionalGeneration"),
    ("t5", "T5EncoderModel"),
    ("vit", "ViTForImageClassification"),
    ("wav2vec2", "Wav2Vec2ForCTC"),
]


@pytest.mark.parametrize("name, head", HEADS, ids=[head for _, head in HEADS])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "configuration"])
def test_a_folder_is_loaded_with_its_head(report, tmp_path, name, head, weights):
    model = find(name).build(head=head)
    model.save_pretrained(tmp_path / "saved")
    if not weights:
        (tmp_path / "saved/model.safetensors").unlink()
    done = report(tmp_path / "saved", *FAST, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["model"] == head and result["kept"] == []
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    for parity in result["parity"].values():
        assert parity["calls"] > 0 and 0 < parity["outputs"] <= 1


def test_a_wrong_head_is_noticed(report, tmp_path, monkeypatch):
    """Hidden states agree: what differs is behind them."""
    from clinattn.tools.model_report import report as module

    find("bert").build(head="BertForSequenceClassification").save_pretrained(tmp_path / "saved")
    replace = module.replace_attention

    def sabotaged(model):
        with torch.no_grad():
            model.classifier.weight.mul_(1.1)
        return replace(model)

    monkeypatch.setattr(module, "replace_attention", sabotaged)
    assert report(tmp_path / "saved", *FAST).exit_code == 1


def test_a_class_of_somebody_else_is_loaded_without_its_head(report, folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForCodingOfOurs"]
    (folder / "config.json").write_text(json.dumps(config))
    done = report(folder, *FAST)
    assert done.exit_code == 0, done.output
    assert "without the head of BertForCodingOfOurs" in done.stdout


@pytest.mark.parametrize("source", [".", "config.json"])
def test_a_configuration_without_weights(report, folder, source):
    (folder / "model.safetensors").unlink()
    done = report(folder / source, *FAST)
    assert done.exit_code == 0, done.output
    assert "random weights" in done.stdout


def test_what_is_not_known_is_taken_for_text(report, tmp_path):
    config = transformers.ErnieConfig(**find("bert").settings)
    config.save_pretrained(tmp_path / "ernie")
    done = report(tmp_path / "ernie", *FAST)
    assert done.exit_code == 0, done.output
    assert "ErnieModel" in done.stdout


def config_of_nothing(folder):
    path = folder / "config.json"
    path.write_text("{}")
    return path


def broken_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not this")
    return folder


def empty_folder(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def not_json(folder):
    (folder / "notes.txt").write_text("notes")
    return folder / "notes.txt"


BAD_SOURCES = [config_of_nothing, broken_weights, empty_folder, not_json]


@pytest.mark.parametrize("make", BAD_SOURCES, ids=lambda make: make.__name__)
def test_a_bad_folder_ends_with_one_line(report, folder, make):
    source = make(folder)
    done = report(source, *FAST)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert line.startswith(f"error: {source}: ")


BAD_INPUT = [
    (["no-such-model"], "error: no-such-model: there is no such folder or file"),
    (["someone/bert-of-the-hub"], "error: someone/bert-of-the-hub: there is no such folder"),
    (["convnext"], "error: ConvNextModel: takes pixel_values"),
    (["bert", "--dtype", "int8"], "error: dtype='int8': expected one of ('float32'"),
    (["bert", "--tokens", "129"], "error: tokens: got 129, expected at most 128"),
    (["bert", "--rounds", "0"], "error: rounds=0: expected at least 1"),
    (["bert", "--batch-size", "-1"], "error: batch_size=-1: expected at least 1"),
    (["bert", "--device", "tpu"], "error: device='tpu': expected one of ('cpu', 'cuda')"),
]


@pytest.mark.parametrize("arguments, message", BAD_INPUT, ids=[" ".join(a) for a, _ in BAD_INPUT])
def test_bad_input_ends_with_one_line(report, arguments, message):
    done = report(*arguments)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert line.startswith(message)


def test_without_transformers_a_line_says_what_to_install(report, monkeypatch):
    ours = ("clinattn.integrations.", "clinattn.tools.model_report.")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = report("bert")
    assert done.exit_code == 2
    assert "pip install 'clinattn[integrations]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_attention_that_computes_something_else_fails(report, monkeypatch):
    from clinattn.integrations.transformers import registry as integration

    own = integration.attention
    wrong = lambda module, query, *args, **words: own(module, 1.1 * query, *args, **words)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, integration.NAME, None)
    monkeypatch.setattr(integration, "attention", wrong)
    done = report("bert", *FAST)
    assert done.exit_code == 1
    assert done.stdout.endswith("failed: the error is larger than what is allowed\n")


@pytest.mark.filterwarnings("ignore:no attention was replaced")
def test_a_model_that_keeps_its_attention_fails(report):
    done = report("deberta-v2", *FAST)
    assert done.exit_code == 1
    assert done.stdout.endswith("failed: no attention was replaced\n")


def test_a_model_without_positions_for_them_gets_fewer_tokens():
    roberta = find("roberta").build()
    assert lengths_for(roberta, ReportSettings("roberta", batch_size=4))[0] == 126
    assert lengths_for(roberta, ReportSettings("roberta", batch_size=4, tokens=16)) == [
        16,
        12,
        8,
        4,
    ]
    assert lengths_for(find("t5").build(), ReportSettings("t5", batch_size=1)) == [256]
