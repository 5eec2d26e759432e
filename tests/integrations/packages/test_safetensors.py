"""Weights through safetensors: names and values survive, also where attention was replaced."""

import pytest
import torch
from encoders import BERT, LENGTHS, MODERN, make_batch, seeded

import clinattn
from clinattn.encoder import Encoder, MaskedLanguageModel

safetensors = pytest.importorskip("safetensors.torch")


def zeroed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


@pytest.mark.parametrize("config", [MODERN, BERT], ids=["modernbert", "bert"])
def test_encoder(config, tmp_path):
    model = seeded(Encoder, config)
    safetensors.save_file(model.state_dict(), tmp_path / "encoder.safetensors")
    twin = zeroed(seeded(Encoder, config))
    twin.load_state_dict(safetensors.load_file(tmp_path / "encoder.safetensors"))
    ids, lengths = make_batch()
    assert torch.equal(twin(ids, lengths=lengths), model(ids, lengths=lengths))


def test_a_model_that_shares_a_weight(tmp_path):
    """The decoder is the embedding: save_model stores it once, load_model gives it to both."""
    model = seeded(MaskedLanguageModel, BERT)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    twin = zeroed(seeded(MaskedLanguageModel, BERT))
    safetensors.load_model(twin, tmp_path / "model.safetensors")
    assert twin.decoder.weight is twin.encoder.embeddings.tokens.weight
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def transformer():
    torch.manual_seed(0)
    return torch.nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()


def hidden(model):
    if isinstance(model, torch.nn.Transformer):
        generator = torch.Generator().manual_seed(1)
        return model(*(torch.randn(2, n, 16, generator=generator) for n in (9, 7)))
    ids, lengths = make_batch()
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    output = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return torch.cat([row[:n] for row, n in zip(output, LENGTHS, strict=True)])


@pytest.mark.parametrize("make", [tiny_bert, transformer])
def test_replaced_attention_keeps_names_and_values(make, tmp_path):
    """Weights saved before the change load after, and the other way round; results are the same."""
    model, replaced = make(), make()
    report = clinattn.replace_attention(replaced)
    assert report.replaced and not report.kept
    before, after = model.state_dict(), replaced.state_dict()
    assert list(before) == list(after)
    safetensors.save_file(after, tmp_path / "after.safetensors")
    loaded = safetensors.load_file(tmp_path / "after.safetensors")
    for name, x in before.items():
        assert torch.equal(loaded[name], x), name
    zeroed(replaced).load_state_dict(loaded)
    with torch.no_grad():
        torch.testing.assert_close(hidden(replaced), hidden(model))
