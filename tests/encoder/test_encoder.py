"""The encoder: packed, padded, alone and torch SDPA give one answer; what it is given, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo  # now: it notes torch.empty_like as it stands, which tests then replace
from encoders import BERT, CONFIGS, LENGTHS, MODERN, cu_seqlens, make_batch, pack, seeded, with_sdpa
from long_double import LongDouble
from torch.nn.attention import SDPBackend, sdpa_kernel

from clinattn.encoder import Encoder, EncoderConfig
from clinattn.encoder.layout import SdpaLayout


def one_by_one(model, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[None, :n])[0] for row, n in zip(ids, lengths, strict=True)])


WAYS = {
    "padded": lambda model, ids, lengths: pack(model(ids, lengths=lengths, layout="padded")),
    "unpadded": lambda model, ids, lengths: pack(model(ids, lengths=lengths)),
    "packed": lambda model, ids, lengths: model(pack(ids), cu_seqlens=cu_seqlens()),
    "alone": one_by_one,
}


def results(
    way: str, config: EncoderConfig, dtype: torch.dtype, convert=torch.Tensor.detach
) -> dict[str, torch.Tensor]:
    """Hidden states of the real tokens, and the gradient of every parameter, in fp64.

    convert: makes of each parameter what stands for it in the computation.
    """
    model = seeded(Encoder, config).to(dtype)
    parameters = {name: convert(p).requires_grad_() for name, p in model.named_parameters()}
    call = lambda *args, **kwargs: torch.func.functional_call(model, parameters, args, kwargs)
    hidden = WAYS[way](call, *make_batch())
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((hidden * weight.to(dtype)).sum(), list(parameters.values()))
    tensors = {"hidden": hidden.detach(), **dict(zip(parameters, grads, strict=True))}
    return {name: getattr(x, "rounded", x.double)() for name, x in tensors.items()}


@pytest.fixture(scope="module", params=CONFIGS)
def config_and_truth(request):
    """The same encoder with plain maths for attention, all of it in long double."""
    config = CONFIGS[request.param]
    with sdpa_kernel(SDPBackend.MATH):
        truth = results("padded", replace(config, attention="sdpa"), torch.float64, LongDouble.of)
    return config, truth


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def yardstick(request, config_and_truth):
    """The largest errors of torch's SDPA in the same dtype, padded or alone."""
    config, truth = config_and_truth
    sdpa = replace(config, attention="sdpa")
    naive = [results(way, sdpa, request.param) for way in ("padded", "alone")]
    errors = {
        name: max((n[name] - expected).abs().max() for n in naive)
        for name, expected in truth.items()
    }
    return config, request.param, truth, errors


@pytest.mark.parametrize("way", WAYS)
def test_every_layout_gives_sdpas_answer_and_gradients(yardstick, way):
    config, dtype, truth, errors = yardstick
    for name, actual in results(way, config, dtype).items():
        error = (actual - truth[name]).abs().max()
        rounding = 2 * torch.finfo(dtype).eps * truth[name].abs().max()
        assert error <= 2 * errors[name] + rounding, name


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
@pytest.mark.parametrize("name", ["modernbert", "causal", "parallel", "global_prefix"])
def test_compiles_as_one_graph(name):
    model = seeded(Encoder, CONFIGS[name]).eval()
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
    with pytest.raises(TypeError, match="int32 or int64, as learned positions are"):
        Encoder(BERT)(ids, positions=index + 0.5)


def test_token_types():
    model = seeded(Encoder, BERT).eval()
    ids, lengths = make_batch()
    zeros = torch.zeros_like(ids)
    plain = model(ids, lengths=lengths)
    torch.testing.assert_close(model(ids, lengths=lengths, token_types=zeros), plain)
    assert (model(ids, lengths=lengths, token_types=zeros + 1) - plain).abs().max() > 1e-3


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
