"""Longformer and LED with their attention replaced, against their own code in fp64."""

from __future__ import annotations

import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from adapted import (
    adapt_all,
    assert_parity,
    assert_same_module,
    largest_tensor,
    randomized,
    softmax_as_given,
)
from support import assert_close, dtype_id

pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    LEDConfig,
    LEDModel,
    LongformerConfig,
    LongformerForSequenceClassification,
    LongformerModel,
)
from transformers.models.longformer import modeling_longformer  # noqa: E402

from clinattn import fused_attention  # noqa: E402
from clinattn.integrations import swap  # noqa: E402
from clinattn.integrations.transformers import longformer  # noqa: E402

BATCH = 3


class GlobalCase(NamedTuple):
    """n: tokens of a row. at: the global tokens of each row. padding: none or its place."""

    n: int
    at: tuple[tuple[int, ...], ...] = ((), (), ())
    padding: str = "none"
    train: bool = False


CASES = {
    "local": GlobalCase(24),
    "local-shorter-than-window": GlobalCase(5),
    "local-two-tokens": GlobalCase(2),
    "local-ragged-n": GlobalCase(41, padding="right"),
    "local-left": GlobalCase(36, padding="left", train=True),
    "local-holes": GlobalCase(29, padding="holes"),
    "cls": GlobalCase(36, ((0,),) * 3),
    "cls-right": GlobalCase(41, ((0,),) * 3, "right", True),
    "cls-left": GlobalCase(41, ((40,),) * 3, "left"),
    "prefix-3": GlobalCase(37, ((0, 1, 2),) * 3, "right"),
    "prefix-3-holes": GlobalCase(37, ((0, 1, 2),) * 3, "holes", True),
    "prefix-longer-than-window": GlobalCase(40, (tuple(range(17)),) * 3),
    "counts-differ": GlobalCase(36, ((0,), (0, 1), (0, 1, 2))),
    "one-row-without": GlobalCase(36, ((0, 3), (), (35,)), "none", True),
    "arbitrary": GlobalCase(47, ((0, 5, 19), (1, 2), (4, 12, 13, 15))),
    "arbitrary-right": GlobalCase(47, ((0, 5, 19), (30,), (4, 12, 13, 15)), "right", True),
    "arbitrary-left": GlobalCase(47, ((46, 40), (31,), (44, 45)), "left"),
    "arbitrary-holes": GlobalCase(35, ((1, 5), (3,), (7, 34)), "holes"),
    "all-global": GlobalCase(13, (tuple(range(13)),) * 3),
}


def make_inputs(case: GlobalCase) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns (input_ids, attention_mask, global_attention_mask), and which tokens are valid."""
    ids = torch.randint(3, 50, (BATCH, case.n))
    valid = torch.ones(BATCH, case.n, dtype=torch.bool)
    for row, lost in enumerate((0, case.n // 3, case.n // 4)):
        if case.padding == "right" and lost:
            valid[row, -lost:] = False
        if case.padding == "left":
            valid[row, :lost] = False
    if case.padding == "holes":
        valid = torch.rand(BATCH, case.n) < 0.7
    is_global = torch.zeros(BATCH, case.n, dtype=torch.long)
    for row, places in enumerate(case.at):
        is_global[row, list(places)] = 1
    valid |= is_global.bool()
    inputs = {"input_ids": ids, "attention_mask": valid.long()}
    return inputs | {"global_attention_mask": is_global}, valid


def config(**changed) -> LongformerConfig:
    values = {
        "vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
        "intermediate_size": 20, "attention_window": [6, 12], "max_position_embeddings": 80,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "pad_token_id": 1,
    } | changed  # fmt: skip
    return LongformerConfig(**values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_longformer(case, dtype):
    model = randomized(LongformerModel(config(), add_pooling_layer=False)).train(case.train)
    inputs, valid = make_inputs(case)
    # rows of padding are zero from attention in both, so that they are compared as well
    assert_parity(model, longformer.adapt, inputs, torch.ones_like(valid), dtype)


@pytest.mark.parametrize("case", ["cls-right", "arbitrary-left"])
def test_led_encoder(case):
    model = LEDModel(
        LEDConfig(
            vocab_size=50, d_model=24, encoder_attention_heads=3, decoder_attention_heads=3,
            encoder_layers=2, decoder_layers=1, encoder_ffn_dim=20, decoder_ffn_dim=20,
            attention_window=[6, 12], max_encoder_position_embeddings=80, dropout=0.0,
            attention_dropout=0.0,
        )
    ).get_encoder()  # fmt: skip
    inputs, valid = make_inputs(CASES[case])
    assert_parity(randomized(model), longformer.adapt, inputs, valid, torch.float32)


# The module alone


def make_module(**changed) -> torch.nn.Module:
    """A replaced layer with one-sided window 6 (layer 1 of config)."""
    module = randomized(modeling_longformer.LongformerSelfAttention(config(**changed), 1))
    assert longformer.adapt(module).replaced
    return module


def call(module, hidden, places: tuple[int, ...], padded: tuple[int, ...] = (), **more):
    """The module on hidden (B, N, E), with the same global tokens and padding in each row."""
    mask = torch.zeros(hidden.shape[:2])
    mask[:, list(places)] = 10000
    mask[:, list(padded)] = -10000
    return module(hidden, mask, mask < 0, mask > 0, bool(places), **more)


@pytest.mark.parametrize("places", [(), (0, 1), (3, 20)], ids=["local", "prefix", "arbitrary"])
def test_memory_is_linear(places):
    """No tensor grows with the square of the length, forward or backward."""
    module = make_module()
    largest = []
    for n in (256, 512):
        hidden = torch.randn(1, n, 24, requires_grad=True)
        with largest_tensor() as sizes:
            call(module, hidden, places)[0].sum().backward()
        largest.append(sizes.largest)
    assert largest[1] <= 2 * largest[0] and largest[1] < 512 * 512 / 4


def test_memory_would_be_seen():
    x = torch.randn(64, 4, requires_grad=True)
    with largest_tensor() as sizes:
        (x @ x.T).sum().backward()
    assert sizes.largest == 64 * 64


@pytest.mark.parametrize("places", [(), (0,), (4, 9)], ids=["local", "prefix", "arbitrary"])
def test_padding_may_hold_nan(places):
    module = make_module()
    hidden = torch.randn(2, 23, 24)
    padded = (7, 21, 22)
    expected = call(module, hidden, places, padded)[0]
    hidden[:, list(padded)] = float("nan")
    assert torch.equal(call(module, hidden, places, padded)[0], expected)
    assert (expected[:, list(padded)] == 0).all()


@pytest.mark.parametrize(
    "places, calls", [((), 1), ((0, 1), 2), ((3, 20), 3)], ids=["local", "prefix", "arbitrary"]
)
def test_calls(places, calls):
    """A prefix of global tokens needs no second pass over the local queries."""
    with mock.patch.object(longformer, "fused_attention", wraps=fused_attention) as spy:
        call(make_module(), torch.randn(2, 23, 24), places)
    assert spy.call_count == calls


@pytest.mark.parametrize("places", [(), (0, 1), (3, 20)], ids=["local", "prefix", "arbitrary"])
def test_per_sample_gradients(places):
    """Gradients of opacus' hooks are the gradients of one sequence at a time."""
    grad_sample = pytest.importorskip("opacus").GradSampleModule
    module, hidden = make_module(), torch.randn(3, 24, 24)
    expected: dict[str, list[torch.Tensor]] = {}
    for row in hidden.split(1):
        module.zero_grad()
        call(module, row, places)[0].square().sum().backward()
        for name, x in module.named_parameters():
            expected.setdefault(name, []).append(torch.zeros_like(x) if x.grad is None else x.grad)
    module.zero_grad()
    watched = grad_sample(module, batch_first=True, loss_reduction="sum")
    call(watched, hidden, places)[0].square().sum().backward()
    for name, x in module.named_parameters():
        if x.requires_grad and (places or "global" not in name):
            torch.testing.assert_close(x.grad_sample, torch.stack(expected[name]))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("places", [(), (0, 1), (3, 20)], ids=["local", "prefix", "arbitrary"])
def test_compiled(places):
    module, hidden = make_module(), torch.randn(2, 23, 24)
    expected = call(module, hidden, places, (21, 22))[0]
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(call(compiled, hidden, places, (21, 22))[0], expected)


@pytest.mark.parametrize("places", [(), (0, 1), (3, 20)], ids=["local", "prefix", "arbitrary"])
def test_autocast(places):
    module, hidden = make_module(), torch.randn(2, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours = call(module, hidden, places)[0]
        longformer.restore(module)
        theirs = call(module, hidden, places)[0]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    with softmax_as_given():
        truth = call(module.double(), hidden.double(), places)[0]
    assert_close("o", ours, truth, theirs)


@pytest.mark.parametrize("places", [(), (0, 1), (3, 20)], ids=["local", "prefix", "arbitrary"])
def test_any_length(places):
    """Without the padding to a multiple of the window the result is the same."""
    module = make_module()
    hidden = torch.randn(2, 36, 24)
    padded = tuple(range(31, 36))
    expected = call(module, hidden, places, padded)[0][:, :31]
    torch.testing.assert_close(call(module, hidden[:, :31], places)[0], expected)


@pytest.mark.parametrize("places", [(), (0,), (3, 20)], ids=["local", "prefix", "arbitrary"])
def test_dropout_has_the_same_distribution(places):
    """The mean and variance over draws are those of the original, within 5 standard errors."""
    module = make_module(attention_probs_dropout_prob=0.3).double()
    draws = 4000
    hidden = torch.randn(1, 24, 24, dtype=torch.float64).expand(draws, -1, -1)
    with torch.no_grad():
        full = call(module.eval(), hidden[:1], places)[0][0]
        ours = call(module.train(), hidden, places)[0]
        longformer.restore(module)
        theirs = call(module, hidden, places)[0]
    for name, actual, expected in (
        ("mean", ours, full),
        ("variance", (ours - full) ** 2, ((theirs - full) ** 2).mean(0)),
    ):
        spread = actual.std(0)
        if name == "variance":
            spread = spread.hypot(((theirs - full) ** 2).std(0))
        off = (actual.mean(0) - expected).abs() / (spread / draws**0.5 + 1e-12)
        assert off.max() < 5, f"{name}: {off.max():.1f} standard errors"


def test_dropout_is_off_in_eval():
    module = make_module(attention_probs_dropout_prob=0.9).eval()
    hidden = torch.randn(1, 24, 24)
    assert torch.equal(call(module, hidden, (3,))[0], call(module, hidden, (3,))[0])


def test_merge_is_exact_and_differentiable():
    """The merge is the softmax over the union, also in rows where one or both sets are empty."""
    scores = torch.randn(1, 1, 5, 7, dtype=torch.float64)
    scores[..., 1, :3] = scores[..., 2, 3:] = scores[..., 3, :] = -torch.inf
    values = torch.randn(7, 4, dtype=torch.float64)

    def part(s, v):
        lse = s.logsumexp(-1)
        p = torch.where(lse.isfinite()[..., None], (s - lse[..., None]).exp(), 0)
        return p.nan_to_num() @ v, lse

    o = longformer.merge(*part(scores[..., :3], values[:3]), *part(scores[..., 3:], values[3:]))
    expected = torch.softmax(scores, -1) @ values
    torch.testing.assert_close(o, expected.nan_to_num())
    o, more = torch.randn(2, 1, 1, 5, 4, dtype=torch.float64, requires_grad=True).unbind()
    lse, more_lse = torch.randn(2, 1, 1, 5, dtype=torch.float64).unbind()
    lse[..., 1] = more_lse[..., 2] = lse[..., 3] = more_lse[..., 3] = -torch.inf
    inputs = [x.detach().requires_grad_() for x in (o, lse, more, more_lse)]
    gradients = torch.autograd.grad(longformer.merge(*inputs).square().sum(), inputs)
    assert all(x.isfinite().all() for x in gradients)
    finite = [x[..., [0, 4]] if x.dim() == 3 else x[..., [0, 4], :] for x in inputs]
    assert torch.autograd.gradcheck(
        longformer.merge, [x.detach().clone().requires_grad_() for x in finite]
    )


@pytest.mark.parametrize("places", [(), (0,)], ids=["local", "global"])
def test_attentions_come_from_the_original(places, monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())
    module = make_module().eval()
    hidden = torch.randn(2, 24, 24)
    with pytest.warns(RuntimeWarning, match="attention probabilities"):
        ours = call(module, hidden, places, output_attentions=True)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        call(module, hidden, places, output_attentions=True)
    longformer.restore(module)
    theirs = call(module, hidden, places, output_attentions=True)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_models_give_attentions():
    inputs, _ = make_inputs(CASES["arbitrary-right"])
    model = randomized(LongformerModel(config())).eval()
    expected = model(**inputs, output_attentions=True, output_hidden_states=True)
    adapt_all(model, longformer.adapt)
    actual = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert actual.keys() == expected.keys()
    for a, b in zip(actual.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing():
    inputs, _ = make_inputs(CASES["arbitrary-right"])
    model = randomized(LongformerModel(config(), add_pooling_layer=False)).train()
    adapt_all(model, longformer.adapt)

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().sum().backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert len(again) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_the_module_stays_itself():
    inputs, _ = make_inputs(CASES["cls-right"])
    model = randomized(LongformerForSequenceClassification(config())).eval()
    assert_same_module(
        model, longformer.adapt, longformer.restore, lambda m: m(**inputs).logits.detach()
    )


def test_what_is_not_replaced():
    class Changed(modeling_longformer.LongformerSelfAttention):
        pass

    module = modeling_longformer.LongformerSelfAttention(config(), 0)
    module.forward = module.forward
    wide = config(hidden_size=272, num_attention_heads=1)
    for refused, reason in (
        (Changed(config(), 0), "subclass"),
        (module, "on the instance"),
        (modeling_longformer.LongformerSelfAttention(wide, 0), "272"),
    ):
        before = type(refused)
        outcome = longformer.adapt(refused)
        assert not outcome.replaced and reason in outcome.detail
        assert type(refused) is before and not longformer.restore(refused)
    assert longformer.adapt(torch.nn.Linear(2, 2)) is None


def test_another_forward_is_refused(monkeypatch):
    module = modeling_longformer.LongformerSelfAttention(config(), 0)
    monkeypatch.setattr(type(module), "forward", lambda self, hidden_states, layer_head_mask: None)
    outcome = longformer.adapt(module)
    assert not outcome.replaced and "layer_head_mask" in outcome.detail


def test_missing_masks_are_refused():
    module = make_module()
    hidden = torch.randn(1, 12, 24)
    mask = torch.zeros(1, 12)
    with pytest.raises(ValueError, match="attention_mask"):
        module(hidden)
    with pytest.raises(ValueError, match="is_index_global_attn"):
        module(hidden, mask, mask < 0, None, True)
