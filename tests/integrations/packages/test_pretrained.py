"""A pretrained encoder gives clinical phrases the embeddings that it gave them before."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("simple_icd_10_cm")

from minilm import (  # noqa: E402
    clinical_phrases,
    embed,
    unpacked_encoder,
)

from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.tools.model_report.parity import CountedAttention  # noqa: E402

PHRASES, BATCH = 300, 50
BOUND = 1e-5  # of entries of vectors of length 1, whose size is about 384 ** -0.5 = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        return unpacked_encoder(tmp_path_factory.mktemp("pretrained"))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def embeddings(model, tokenizer, side):
    tokenizer.padding_side = side
    phrases = clinical_phrases(PHRASES)
    batches = [phrases[i : i + BATCH] for i in range(0, PHRASES, BATCH)]
    with torch.no_grad():
        found = [
            embed(model, dict(tokenizer(batch, padding=True, return_tensors="pt")))
            for batch in batches
        ]
    return torch.cat(found)


@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_of_icd_10_titles_are_those_of_eager_attention(folder, side):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    load = lambda: transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    eager, model = load().eval(), load().eval()
    report = replace_attention(model)
    assert (len(report.replaced), report.kept) == (model.config.num_hidden_layers, [])
    expected = embeddings(eager, tokenizer, side)
    with CountedAttention() as counted:
        actual = embeddings(model, tokenizer, side)
    assert counted.calls == model.config.num_hidden_layers * PHRASES // BATCH
    assert (actual - expected).abs().max() <= BOUND
    # the phrases are told apart, so that equal embeddings mean something
    assert (expected @ expected.T).fill_diagonal_(0).max() < 1 - 100 * BOUND
    lengths = {len(tokenizer(phrase)["input_ids"]) for phrase in clinical_phrases(PHRASES)}
    assert len(lengths) > 10
