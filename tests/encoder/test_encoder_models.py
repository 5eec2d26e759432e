"""The encoder is the models it is named after: torch's layers, transformers' classes, sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoders import BERT, MODERN, make_batch, pack, seeded
from torch import nn

from clinattn.encoder import PRESETS, Encoder, EncoderConfig, MaskedLanguageModel

# The names in transformers of the sizes that MODERN and BERT share.
SIZES = {
    "vocab_size": MODERN.vocab_size,
    "hidden_size": MODERN.hidden_size,
    "intermediate_size": MODERN.intermediate_size,
    "num_attention_heads": MODERN.num_heads,
    "attn_implementation": "sdpa",
}


@pytest.mark.parametrize(
    ("preset", "encoder", "with_head"),
    [
        # counted on transformers' ...ForMaskedLM classes of the same config, without poolers
        ("clinicalbert", 107_719_680, 108_340_804),
        ("bioclinical-modernbert-base", 149_014_272, 149_655_232),
        ("bioclinical-modernbert-large", 394_781_696, 395_881_664),
        ("gatortron-base", 354_217_984, 355_319_808),
        ("clinical-longformer", 148_068_864, 148_711_257),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, encoder, with_head):
    with torch.device("meta"):
        model = MaskedLanguageModel(EncoderConfig.preset(preset))
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == with_head


def test_clmbrs_angles_and_window_are_femrs():
    config = PRESETS["clmbr"]
    theirs = 10_000.0 ** -torch.linspace(0, 2, 32, dtype=torch.float64)
    ours = config.rotary_base_window ** -(torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(ours, theirs)
    assert config.causal and set(config.windows) == {496 - 1}  # 496 keys with the token's own


def test_clmbr_is_femrs_transformer():
    """The block in plain maths: one norm, one linear layer in, one out, neighbours turn."""
    half, window = 8, 9
    config = replace(
        PRESETS["clmbr"],
        vocab_size=MODERN.vocab_size,
        hidden_size=48,
        num_heads=3,
        intermediate_size=40,
        num_layers=2,
        windows=(window - 1,) * 2,
        rotary_base_window=10_000.0 ** (2 * half / (half - 1)),
    )
    model = seeded(Encoder, config).double().eval()
    ids, ages = make_batch()[0][2], torch.rand(63, dtype=torch.float64).cumsum(0) * 300
    x = model.embeddings.norm(model.embeddings.tokens(ids))
    angles = ages[:, None, None] * 10_000.0 ** -torch.linspace(0, 2, half, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    age = torch.arange(63)
    near = (age[:, None] >= age) & (age[:, None] - age < window)
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        fused_in = torch.cat((attention.qkv.weight, feed_forward.up.weight))
        fused_out = torch.cat((attention.out.weight, feed_forward.down.weight), 1)
        bias_in = torch.cat((attention.qkv.bias, feed_forward.up.bias))
        inner = layer.attention_norm(x) @ fused_in.T + bias_in
        q, k, v = inner[:, : 3 * 48].view(63, 3, 3, 16).unbind(1)
        q, k = (torch.complex(*z.chunk(2, -1)) * turn for z in (q, k))
        scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real / 4
        p = scores.masked_fill(~near, -torch.inf).softmax(-1)
        o = torch.einsum("hij,jhd->ihd", p, v).flatten(1)
        both = torch.cat((o, nn.functional.gelu(inner[:, 3 * 48 :])), 1)
        x = x + both @ fused_out.T + attention.out.bias + feed_forward.down.bias
    expected = model.final_norm(x)
    ends = torch.tensor([0, 63], dtype=torch.int32)
    actual = model(ids, cu_seqlens=ends, positions=ages)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_modernbert_looks_everywhere_in_every_third_layer():
    windows = PRESETS["bioclinical-modernbert-base"].windows
    assert [i for i, w in enumerate(windows) if w is None] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert set(windows) == {None, 64}


def test_post_norm_layers_are_torchs_transformer_encoder():
    model = seeded(Encoder, BERT).double().eval()
    twin = nn.TransformerEncoderLayer(
        48, 3, 40, dropout=0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    ).double()
    ids = make_batch()[0][2:3]
    at = torch.arange(63)
    expected = model.embeddings(ids, at, None)
    for layer in model.layers:
        twin.load_state_dict(
            {
                "self_attn.in_proj_weight": layer.attention.qkv.weight,
                "self_attn.in_proj_bias": layer.attention.qkv.bias,
                "self_attn.out_proj.weight": layer.attention.out.weight,
                "self_attn.out_proj.bias": layer.attention.out.bias,
                "linear1.weight": layer.feed_forward.up.weight,
                "linear1.bias": layer.feed_forward.up.bias,
                "linear2.weight": layer.feed_forward.down.weight,
                "linear2.bias": layer.feed_forward.down.bias,
                "norm1.weight": layer.attention_norm.weight,
                "norm1.bias": layer.attention_norm.bias,
                "norm2.weight": layer.feed_forward_norm.weight,
                "norm2.bias": layer.feed_forward_norm.bias,
            }
        )
        expected = twin(expected)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-12)


def test_modernbert_is_transformers_modernbert():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = transformers.ModernBertConfig(
        **SIZES, num_hidden_layers=4, local_attention=10, pad_token_id=0
    )
    theirs = seeded(transformers.ModernBertForMaskedLM, sizes)
    ours = MaskedLanguageModel(replace(MODERN, num_layers=4, windows=(None, 5, 5, None)))
    names = {
        "model.": "encoder.",
        "tok_embeddings": "tokens",
        "head.dense": "head.0",
        "head.norm": "head.2",
        "attn.Wqkv": "attention.qkv",
        "attn.Wo": "attention.out",
        "attn_norm": "attention_norm",
        "mlp.Wi": "feed_forward.up",
        "mlp.Wo": "feed_forward.down",
        "mlp_norm": "feed_forward_norm",
    }
    assert_same_logits(ours, theirs, names)


def test_clinicalbert_is_transformers_bert():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = transformers.BertConfig(
        **SIZES,
        num_hidden_layers=BERT.num_layers,
        max_position_embeddings=BERT.max_positions,
    )
    theirs = seeded(transformers.BertForMaskedLM, sizes)
    names = {
        "bert.": "encoder.",
        "cls.predictions.transform.dense": "head.0",
        "cls.predictions.transform.LayerNorm": "head.2",
        "cls.predictions.decoder": "decoder",
        "cls.predictions.bias": "decoder.bias",
        "encoder.encoder.": "encoder.",
        "word_embeddings": "tokens",
        "position_embeddings": "positions",
        "token_type_embeddings": "types",
        "embeddings.LayerNorm": "embeddings.norm",
        "layer.": "layers.",
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_norm",
    }
    assert_same_logits(MaskedLanguageModel(BERT), theirs, names)


def assert_same_logits(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Loads the weights of theirs under our names and compares on a ragged batch."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        for their_part, our_part in names.items():
            name = name.replace(their_part, our_part)
        state[name] = tensor
    for name in [name for name in state if "self.query" in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("self.query", "qkv")] = torch.cat(parts)
    ours.load_state_dict({k: v for k, v in state.items() if k in ours.state_dict()})
    ids, lengths = make_batch()
    mask = (torch.arange(63) < lengths[:, None]).long()
    ours.double().eval(), theirs.double().eval()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        actual = ours(ids, lengths=lengths).logits
    # their rotary tables and softmax are fp32 in any dtype
    torch.testing.assert_close(pack(actual), pack(expected), rtol=0, atol=2e-5)


def test_bad_presets_are_named():
    with pytest.raises(ValueError, match="preset 'bert' is unknown: expected one of"):
        EncoderConfig.preset("bert")
    with pytest.raises(TypeError, match=r"no field \['layers'\]"):
        EncoderConfig.preset("tiny", layers=3)
    assert EncoderConfig.preset("tiny", vocab_size=9).vocab_size == 9
