"""The encoder: packed, padded, alone and torch SDPA give one answer; heads, presets, errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch._dynamo  # now: it notes torch.empty_like as it stands, which tests then replace
import torch.nn.functional as F
from torch import nn

from clinattn.encoder import (
    PRESETS,
    Encoder,
    EncoderConfig,
    MaskedLanguageModel,
    SequenceClassifier,
)
from clinattn.encoder.layout import SdpaLayout

LENGTHS = (17, 1, 63, 40)
MODERN = EncoderConfig(
    vocab_size=101,
    hidden_size=48,
    num_layers=3,
    num_heads=3,
    intermediate_size=40,
    max_positions=64,
    first_norm=False,
    rotary_base=160_000.0,
    windows=(None, 5, 5),
)
BERT = replace(
    MODERN,
    norm="post",
    norm_eps=1e-12,
    norm_bias=True,
    linear_bias=True,
    positions="learned",
    activation="gelu",
    windows=(),
    token_types=2,
)
CONFIGS = {
    "modernbert": MODERN,
    "bert": BERT,
    "bert_rotary_window": replace(BERT, positions="rotary", windows=(7, 0, None)),
    "pre_learned_geglu": replace(MODERN, positions="learned", first_norm=True, linear_bias=True),
    "one_head": replace(MODERN, num_heads=1),
}


def make_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, N) with a random token, not a special one, in the padding; lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MODERN.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return ids, torch.tensor(LENGTHS)


def pack(padded: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, LENGTHS, strict=True)])


def cu_seqlens() -> torch.Tensor:
    return torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)


def seeded(kind, config, *args) -> nn.Module:
    """A model whose attention matters: torch's usual 0.02 leaves every softmax almost flat."""
    torch.manual_seed(0)
    model = kind(config, *args)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[0] != config.vocab_size:
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
    return model


def with_sdpa(model: nn.Module) -> nn.Module:
    """The same weights with attention='sdpa'."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Encoder):
            module.config = replace(module.config, attention="sdpa")
    return twin


def one_by_one(model: nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[None, :n])[0] for row, n in zip(ids, lengths, strict=True)])


WAYS = {
    "padded": lambda model, ids, lengths: pack(model(ids, lengths=lengths, layout="padded")),
    "unpadded": lambda model, ids, lengths: pack(model(ids, lengths=lengths)),
    "packed": lambda model, ids, lengths: model(pack(ids), cu_seqlens=cu_seqlens()),
    "alone": one_by_one,
}


def results(way: str, config: EncoderConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states of the real tokens, and the gradient of every parameter, in fp64."""
    model = seeded(Encoder, config).to(dtype)
    hidden = WAYS[way](model, *make_batch())
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weight.to(dtype)).sum().backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters()}
    return {"hidden": hidden.detach().double()} | grads


@pytest.fixture(scope="module", params=CONFIGS)
def truth_and_errors(request):
    """fp64 through torch's SDPA, and its largest errors in fp32, padded or alone: the yardstick."""
    config = CONFIGS[request.param]
    sdpa = replace(config, attention="sdpa")
    truth = results("padded", sdpa, torch.float64)
    naive = [results(way, sdpa, torch.float32) for way in ("padded", "alone")]
    errors = {
        name: max((n[name] - expected).abs().max() for n in naive)
        for name, expected in truth.items()
    }
    return config, truth, errors


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_every_layout_gives_sdpas_answer_and_gradients(truth_and_errors, way, dtype):
    config, truth, errors = truth_and_errors
    # fp64 repeats fp32's arithmetic in smaller units, so its error scales with them. The truth is
    # fp64 too: what it errs itself stands between the two.
    units = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    share = 2 if dtype == torch.float32 else 3
    for name, actual in results(way, config, dtype).items():
        error = (actual - truth[name]).abs().max()
        rounding = 2 * torch.finfo(dtype).eps * truth[name].abs().max()
        assert error <= share * errors[name] * units + rounding, name


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_padding_never_reaches_a_real_token(layout):
    model = seeded(Encoder, MODERN).eval()
    ids, lengths = make_batch()
    other = torch.where(torch.arange(ids.shape[1]) < lengths[:, None], ids, 100 - ids)
    a, b = (model(x, lengths=lengths, layout=layout) for x in (ids, other))
    assert torch.equal(pack(a), pack(b))
    if layout == "packed":
        assert torch.equal(a[0, LENGTHS[0] :], torch.zeros_like(a[0, LENGTHS[0] :]))


@pytest.mark.parametrize("attention", ["clinattn", "sdpa"])
@pytest.mark.parametrize("window", [0, 3])
def test_a_window_layer_sees_exactly_its_window(attention, window):
    config = replace(MODERN, num_layers=1, windows=(window,), attention=attention)
    model = seeded(Encoder, config).eval()
    ids, _ = make_batch()
    ids = ids[2:3]
    changed = ids.clone()
    changed[0, 30] = (ids[0, 30] + 1) % 101
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    seen = (torch.arange(63) - 30).abs() <= window
    assert (difference[seen] > 0).all() and (difference[~seen] == 0).all()


def test_sdpa_baseline_has_no_mask_without_padding_and_one_per_window():
    full = SdpaLayout(None, 9, torch.device("cpu"))
    assert full.mask(None, torch.float32) is None
    assert full.mask(2, torch.float32).shape == (9, 9)
    ragged = SdpaLayout(torch.tensor([4, 9, 0]), 9, torch.device("cpu"))
    assert ragged.mask(None, torch.float32).shape == (3, 1, 1, 9)
    mask = ragged.mask(2, torch.float32)
    assert mask.shape == (3, 1, 9, 9) and (mask == 0).any(-1).all()


def test_an_empty_sequence_is_harmless():
    model = seeded(Encoder, MODERN).eval()
    ids, _ = make_batch()
    lengths = torch.tensor([17, 0, 63, 40])
    reference = model(ids[[0, 2, 3]], lengths=lengths[[0, 2, 3]])
    for layout in ("packed", "padded"):
        hidden = model(ids, lengths=lengths, layout=layout)
        torch.testing.assert_close(hidden[0, :17], reference[0, :17])
    assert with_sdpa(model)(ids, lengths=lengths)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["modernbert", "bert"])
def test_masked_language_model_scores_labelled_tokens_only(name):
    model = seeded(MaskedLanguageModel, CONFIGS[name])
    ids, lengths = make_batch()
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[2, 7], labels[2, 62], labels[3, 0] = 5, 6, 7, 8
    rows: list[int] = []
    model.decoder.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    out = model(ids, lengths=lengths, labels=labels)
    assert rows == [4]
    everywhere = model(ids, lengths=lengths).logits
    assert everywhere.shape == (*ids.shape, MODERN.vocab_size)
    torch.testing.assert_close(out.logits, everywhere[labels != -100])
    torch.testing.assert_close(out.loss, F.cross_entropy(everywhere.mT, labels))
    for other in (
        model(ids, lengths=lengths, labels=labels, layout="padded"),
        model(pack(ids), cu_seqlens=cu_seqlens(), labels=pack(labels)),
        with_sdpa(model)(ids, lengths=lengths, labels=labels),
    ):
        torch.testing.assert_close(other.logits, out.logits)
        torch.testing.assert_close(other.loss, out.loss)


def test_nothing_labelled_gives_zero_loss_and_gradients():
    model = MaskedLanguageModel(MODERN)
    ids, lengths = make_batch()
    loss = model(ids, lengths=lengths, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_decoder_is_the_embedding():
    model = MaskedLanguageModel(MODERN)
    assert model.decoder.weight is model.encoder.embeddings.tokens.weight
    assert sum(p.shape == (101, 48) for p in model.parameters()) == 1


def test_sequence_classifier():
    model = seeded(SequenceClassifier, MODERN, 4)
    ids, lengths = make_batch()
    classes = torch.tensor([0, 3, 1, 2])
    out = model(ids, lengths=lengths, labels=classes)
    assert out.logits.shape == (4, 4)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, classes))
    for other in (
        model(ids, lengths=lengths, layout="padded"),
        model(pack(ids), cu_seqlens=cu_seqlens()),
        with_sdpa(model)(ids, lengths=lengths),
    ):
        torch.testing.assert_close(other.logits, out.logits)
        assert other.loss is None
    several = torch.rand(4, 4)
    out = model(ids, lengths=lengths, labels=several)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, several))
    with pytest.raises(ValueError, match=r"labels has shape \(4,\): expected \(4, 4\)"):
        model(ids, lengths=lengths, labels=several[0])
    with pytest.raises(ValueError, match="num_labels=0"):
        SequenceClassifier(MODERN, num_labels=0)


def test_a_few_steps_learn_a_batch():
    model = seeded(MaskedLanguageModel, MODERN)
    ids, lengths = make_batch()
    labels = torch.where(torch.arange(63) < lengths[:, None], ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(ids, lengths=lengths, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.unpoisoned
def test_per_sequence_gradients_by_vmap():
    model = seeded(Encoder, MODERN).double()
    ids = make_batch()[0]
    parameters = dict(model.named_parameters())

    def score(parameters, row):
        args = (row[None],), {"layout": "padded"}
        return torch.func.functional_call(model, parameters, *args).square().sum()

    together = torch.func.vmap(torch.func.grad(score), (None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        for name, expected in torch.func.grad(score)(parameters, row).items():
            torch.testing.assert_close(together[name][i], expected)


@pytest.mark.unpoisoned
def test_compiles_as_one_graph():
    model = seeded(Encoder, MODERN).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, at = pack(make_batch()[0]), cu_seqlens()
    expected = model(ids, cu_seqlens=at, max_seqlen=63)
    torch.testing.assert_close(compiled(ids, cu_seqlens=at, max_seqlen=63), expected)


def test_positions_may_be_given_and_real():
    model = seeded(Encoder, MODERN).double().eval()
    ids, lengths = make_batch()
    plain = model(ids, lengths=lengths)
    index = torch.arange(63).expand(4, 63)
    torch.testing.assert_close(model(ids, lengths=lengths, positions=index), plain)
    # a turn of every position by the same real time leaves the angles between tokens
    shifted = model(ids, lengths=lengths, positions=index + 1234.56, layout="padded")
    torch.testing.assert_close(pack(shifted), pack(plain), rtol=0, atol=1e-9)
    stretched = model(ids, lengths=lengths, positions=index * 2.5)
    assert (stretched - plain).abs().max() > 1e-3
    with pytest.raises(TypeError, match="learned positions expect integers"):
        Encoder(BERT)(ids, positions=index + 0.5)


def test_token_types():
    model = seeded(Encoder, BERT).eval()
    ids, lengths = make_batch()
    zeros = torch.zeros_like(ids)
    plain = model(ids, lengths=lengths)
    torch.testing.assert_close(model(ids, lengths=lengths, token_types=zeros), plain)
    assert (model(ids, lengths=lengths, token_types=zeros + 1) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("preset", "encoder", "with_head"),
    [
        # counted on transformers' BertForMaskedLM and ModernBertForMaskedLM of the same config
        ("clinicalbert", 107_719_680, 108_340_804),
        ("bioclinical-modernbert-base", 149_014_272, 149_655_232),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, encoder, with_head):
    with torch.device("meta"):
        model = MaskedLanguageModel(EncoderConfig.preset(preset))
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == with_head


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
        vocab_size=101,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=3,
        local_attention=10,
        pad_token_id=0,
        attn_implementation="sdpa",
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
        vocab_size=101,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=64,
        attn_implementation="sdpa",
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
    """Load their weights under our names and compare on a ragged batch."""
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


def test_dropout_acts_in_training_only():
    config = replace(BERT, hidden_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5)
    model = seeded(Encoder, replace(config, attention="sdpa"))
    ids, lengths = make_batch()
    model.eval()
    assert torch.equal(model(ids, lengths=lengths), model(ids, lengths=lengths))
    model.train()
    assert not torch.equal(model(ids, lengths=lengths), model(ids, lengths=lengths))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 50}, "hidden_size=50: expected a multiple of num_heads=3"),
        ({"num_layers": 0}, "num_layers=0: expected at least 1"),
        ({"windows": (1, 2)}, "windows has 2 entries: expected one for each of the num_layers=3"),
        ({"windows": (-1, 2, 3)}, r"windows=\(-1, 2, 3\): expected"),
        ({"norm": "rms"}, r"norm='rms': expected one of \('pre', 'post'\)"),
        ({"attention": "flash"}, "attention='flash'"),
        ({"hidden_size": 45}, "head_dim=15: rotary positions expect an even head_dim"),
        ({"attention_dropout": 1.5}, r"attention_dropout=1.5: expected 0 <= p < 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MODERN, **change)


def test_bad_presets_are_named():
    with pytest.raises(ValueError, match="preset 'bert' is unknown: expected one of"):
        EncoderConfig.preset("bert")
    with pytest.raises(TypeError, match=r"no field \['layers'\]"):
        EncoderConfig.preset("tiny", layers=3)
    assert EncoderConfig.preset("tiny", vocab_size=9).vocab_size == 9


IDS = torch.zeros(2, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("ids", "batch", "message"),
    [
        (IDS[0], {}, "1-D input_ids are packed: expected cu_seqlens"),
        (IDS[0], {"cu_seqlens": cu_seqlens(), "lengths": torch.tensor([8])}, "and no lengths"),
        (IDS[0], {"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens=\[0, 5\]: expected"),
        (IDS[None], {}, r"input_ids has shape \(1, 2, 8\): expected \(T,\) with cu_seqlens"),
        (IDS, {"cu_seqlens": cu_seqlens()}, "belong to 1-D input_ids"),
        (IDS, {"lengths": torch.tensor([8])}, r"lengths has shape \(1,\): expected \(2,\)"),
        (IDS, {"lengths": torch.tensor([8, 9])}, r"lengths=\[8, 9\]: expected 0 to N=8"),
        (IDS, {"layout": "nested"}, "layout='nested': expected 'packed' or 'padded'"),
    ],
)
def test_bad_batches_are_named(ids, batch, message):
    with pytest.raises(ValueError, match=message):
        Encoder(MODERN)(ids, **batch)


def test_other_bad_batches_are_named():
    with pytest.raises(TypeError, match="input_ids has dtype torch.float32: expected integer"):
        Encoder(MODERN)(IDS.float())
    with pytest.raises(
        ValueError, match="a sequence of 65 tokens: expected at most max_positions=64"
    ):
        Encoder(BERT)(torch.zeros(1, 65, dtype=torch.long))
    sdpa = Encoder(replace(MODERN, attention="sdpa"))
    with pytest.raises(ValueError, match="attention='sdpa' has no packed form"):
        sdpa(IDS, layout="packed")
    with pytest.raises(ValueError, match="expected attention='clinattn'"):
        sdpa(IDS[0], cu_seqlens=torch.tensor([0, 8]))
