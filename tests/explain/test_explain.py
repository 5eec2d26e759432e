"""Numbers by token of a whole model against products of its N x N matrices, in fp64."""

import threading

import pytest
import torch
from explained import DEPTH, HEADS, WIDTH, Stack, assert_equal, dense
from torch import nn

import clinattn
from clinattn.encoder import Encoder, EncoderConfig
from clinattn.operator import listeners

N = 11
AT = torch.arange(N)
BETWEEN = AT[:, None] - AT  # i - j
LENGTHS = torch.tensor([N, 6])
REAL = AT < LENGTHS[:, None]
LEFT = REAL.flip(1)
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3], [0, 0, 1, 1, 1, 1, 7, 7, 8, 8, 9]])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0]).double()


def pairs(visible):
    """(B, N, N) as (B, 1, N, N)."""
    return visible[:, None] if visible.dim() == 3 else visible[None, None]


ALL = torch.ones(N, N, dtype=torch.bool)
RANDOM = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) < 0.4
RANDOM |= AT[:, None] == AT

# name: (words of fused_attention, visible pairs, real tokens, kv heads, change of scores)
CASES = {
    "full": ({}, ALL, None, HEADS, None),
    "grouped": ({}, ALL, None, 2, None),
    "causal": ({"is_causal": True}, BETWEEN >= 0, None, HEADS, None),
    "window": ({"window": (3, 1)}, (BETWEEN <= 3) & (BETWEEN >= -1), None, 2, None),
    "right": (
        {"kv_lengths": LENGTHS, "q_lengths": LENGTHS}, REAL[:, None] & REAL[..., None], REAL, HEADS,
        None,
    ),
    "right, keys alone": ({"kv_lengths": LENGTHS}, REAL[:, None] & ALL, REAL, HEADS, None),
    "left": ({"attn_mask": LEFT[:, None, None]}, LEFT[:, None] & ALL, LEFT, HEADS, None),
    "left, floating": (
        {"attn_mask": torch.where(LEFT, 0.0, -torch.inf).double()[:, None, None]},
        LEFT[:, None] & ALL, LEFT, HEADS, None,
    ),
    "left and window": (
        {"attn_mask": LEFT[:, None, None], "window": 2}, LEFT[:, None] & (BETWEEN.abs() <= 2), LEFT,
        HEADS, None,
    ),
    "every pair for itself": ({"attn_mask": RANDOM}, RANDOM, None, HEADS, None),
    "segments": (
        {"segment_ids": SEGMENTS}, SEGMENTS[:, None] == SEGMENTS[..., None], None, HEADS, None,
    ),
    "global": (
        {"window": 2, "global_prefix": 2},
        (BETWEEN.abs() <= 2) | (AT < 2) | (AT < 2)[:, None], None, HEADS, None,
    ),
    "slopes and softcap": (
        {"alibi_slopes": SLOPES, "softcap": 2.0}, ALL, None, HEADS,
        lambda s: 2 * (s / 2).tanh() - SLOPES[:, None, None] * BETWEEN.abs(),
    ),
}  # fmt: skip
TERMS = DEPTH * (N + WIDTH) * 4  # sums in a row from the input to a result


@pytest.fixture(params=CASES, ids=str)
def case(request):
    words, visible, real, kv_heads, scores = CASES[request.param]
    model = Stack(kv_heads)
    x = torch.randn(2, N, WIDTH).double()
    visible = pairs(visible)
    real = torch.ones(2, N, dtype=torch.bool) if real is None else real
    readout = torch.randn(WIDTH).double()
    with dense(model, visible, *([scores] if scores else [])) as matrices:
        target = ((model(x) @ readout) * first_of(real)).sum()
        grads = torch.autograd.grad(target, list(matrices))
    with clinattn.explain(model) as e:
        out = model(x, **words)
    return e, (out @ readout * first_of(real)).sum(1), matrices, grads, real.double()


def first_of(real):
    """1 at the first real token of each row."""
    real = real.bool()
    return (real & (real.cumsum(1) == 1)).double()


def test_received(case):
    e, _, matrices, _, real = case
    received = e.received(heads=None)
    assert_equal("received", received, matrices.received(real) * real[:, None], TERMS)
    assert_equal("mean", e.received(), received.mean(2), TERMS)
    assert_equal("of two heads", e.received(heads=[0, 2]), received[:, :, [0, 2]].mean(2), TERMS)
    weights = torch.rand(2, N).double()
    expected = matrices.received(weights * real).mean(2) * real
    assert_equal("weighted", e.received(weights), expected, TERMS)


def test_entropy_and_topk(case):
    e, _, matrices, _, real = case
    assert_equal("entropy", e.entropy(heads=None), matrices.entropy() * real[:, None], TERMS)
    values, places = e.topk(0, 3)
    rows = torch.stack([(p.detach() * first_of(real)[:, None, :, None]).sum(2) for p in matrices])
    assert_equal("values", values, rows.topk(3).values, TERMS)
    assert torch.equal(places == -1, values == 0)
    there = values > 0
    at_places = rows.gather(-1, places.clamp(min=0))
    assert_equal("places", at_places[there], values[there], TERMS)


def test_rollout(case):
    e, _, matrices, _, real = case
    first = first_of(real)
    assert_equal("first", e.rollout(0), matrices.rollout(first) * real, TERMS)
    last = first_of(real.flip(1)).flip(1)
    assert_equal("last", e.rollout(-1), matrices.rollout(last) * real, TERMS)
    each = torch.stack((e.rollout(0)[0], e.rollout(-1)[1]))
    assert torch.equal(e.rollout([0, -1]), each)
    mean = real / real.sum(1, keepdim=True)
    assert_equal("mean", e.rollout("mean"), matrices.rollout(mean) * real, TERMS)
    expected = matrices.rollout(first, 0.2, [1, 3]) * real
    assert_equal("two heads", e.rollout(0, 0.2, [1, 3]), expected, TERMS)


def test_relevance(case):
    e, target, matrices, grads, real = case
    first = first_of(real)
    assert_equal("relevance", e.relevance(target), matrices.relevance(first, grads) * real, TERMS)
    assert e.token_read(target).tolist() == [0, 0]
    assert_equal("again", e.relevance(target, 0), e.relevance(target), 1)


def test_packed_is_alone():
    """Sequences packed by cu_seqlens have the numbers of each alone, token by token."""
    model = Stack(2)
    parts = [torch.randn(n, WIDTH).double() for n in (7, 1, 11)]
    cu_seqlens = torch.tensor([0, 7, 8, 19], dtype=torch.int32)
    with clinattn.explain(model) as packed:
        out = model(torch.cat(parts), cu_seqlens=cu_seqlens, window=3)
    ends = cu_seqlens[1:].long() - 1
    answers = [
        packed.received(heads=None), packed.rollout(-1), packed.relevance(out[ends].sum(1), -1),
        packed.rollout("mean"), packed.entropy(),
    ]  # fmt: skip
    assert packed.token_read(out[ends].sum(1)).tolist() == [6, 0, 10]
    values, places = packed.topk(-1, 4)
    start = 0
    for s, part in enumerate(parts):
        with clinattn.explain(model) as e:
            out = model(part[None], window=3)
        alone = [
            e.received(heads=None)[:, 0], e.rollout(-1)[0], e.relevance(out[:, -1].sum(1), -1)[0],
            e.rollout("mean")[0], e.entropy()[:, 0],
        ]  # fmt: skip
        here = slice(start, start + len(part))
        for name, x, y in zip("rcRme", answers, alone, strict=True):
            assert_equal(name, x[..., here], y, TERMS)
        assert_equal("split", packed.split(answers[1])[s], alone[1], TERMS)
        found, keys = e.topk(-1, 4)
        assert_equal("topk", values[:, s], found[:, 0], TERMS)
        assert torch.equal(places[:, s], keys[:, 0])
        start += len(part)


def test_the_last_call_counts_and_a_layer_may_be_chosen():
    model, x = Stack(), torch.randn(2, N, WIDTH).double()
    with clinattn.explain(model) as e, clinattn.explain(model, layers=[1]) as one:
        model(x[:, :4])
        model(x)
    assert e.layers == ("blocks.0", "blocks.1", "blocks.2") and one.layers == ("blocks.1",)
    assert torch.equal(e.received()[1:2], one.received())
    with pytest.raises(ValueError, match="layers: 1 of 3 were kept, expected all for rollout"):
        one.rollout(0)
    with clinattn.explain(model, layers=[3]) as none:
        model(x)
    with pytest.raises(ValueError, match=r"layers: got \[3\], and the model called attention 3"):
        none.received()
    assert not listeners.on and not any(m._forward_pre_hooks for m in model.modules())


def test_other_threads_and_models_are_not_heard():
    model, other, x = Stack(), Stack(), torch.randn(2, N, WIDTH).double()
    with clinattn.explain(model) as e:
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
        other(x)
        clinattn.fused_attention(*torch.randn(3, 1, 1, 4, 8))
    with pytest.raises(RuntimeError, match="no attention of Stack was recorded.*replace_attention"):
        e.received()


def test_results_are_the_same_to_the_bit_and_nothing_is_kept_for_inference():
    model, x = Stack().float(), torch.randn(2, N, WIDTH)
    with torch.no_grad():
        alone = model(x)
        with clinattn.explain(model) as e:
            assert torch.equal(model(x), alone)
        assert e.rollout(0).shape == (2, N)
    assert all(x.o is None and x.call.v.shape[-1] == 1 for x in e._recorder.layers)
    with pytest.raises(ValueError, match="target: has no gradient"):
        e.relevance(alone[:, 0].sum(1))


def test_an_error_within_leaves_the_model_as_it_was():
    model = Stack()
    with pytest.raises(RuntimeError), clinattn.explain(model):
        model(torch.randn(2, N, WIDTH + 1).double())
    assert not listeners.on and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_nn(batch_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = torch.randn(2, N, 16).double()
    given = x if batch_first else x.transpose(0, 1)
    truth, hidden = [], ~REAL
    with torch.no_grad():
        seen = given
        for one in model.layers:
            truth.append(one.self_attn(seen, seen, seen, key_padding_mask=hidden)[1])
            seen = one(seen, src_key_padding_mask=hidden)
    clinattn.replace_attention(model)
    with clinattn.explain(model) as e, torch.no_grad():
        model(given, src_key_padding_mask=hidden)
    assert e.layers == ("layers.0.self_attn", "layers.1.self_attn")
    expected = torch.stack([(p * REAL[..., None]).sum(1) for p in truth])
    assert_equal("received", e.received(), expected, TERMS)


def test_cross_attention_is_refused_by_name():
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    clinattn.replace_attention(model)
    with clinattn.explain(model) as e:
        model(torch.randn(2, N, 16), torch.randn(2, N, 16))
    with pytest.raises(ValueError, match=r"decoder.layers.0.multihead_attn \(layer 2\): is cross"):
        e.rollout(0)
    with clinattn.explain(model, layers=[0, 1]) as e:
        model(torch.randn(2, N, 16), torch.randn(2, N, 16))
    assert e.received().shape == (2, 2, N)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_global_tokens_of_their_own_weights_are_refused(layout):
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    config = EncoderConfig.preset("clinical-longformer", vocab_size=50, windows=(3,), **size)
    model = Encoder(config).eval()
    with clinattn.explain(model) as e:
        model(torch.randint(50, (2, N)), layout=layout)
    with pytest.raises(ValueError, match=r"layers.0.attention \(layer 0\): is made of several"):
        e.received()


def test_layers_of_other_tokens_are_refused():
    class Halved(Stack):
        def forward(self, x):
            return self.blocks[1](self.blocks[0](x)[:, ::2])

    model = Halved()
    with clinattn.explain(model) as e:
        model(torch.randn(2, N, WIDTH).double())
    with pytest.raises(ValueError, match=r"blocks.1 \(layer 1\): has tokens \(2, 6\), expected"):
        e.received()


def test_dropout_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    clinattn.replace_attention(layer)
    with pytest.raises(ValueError, match=r"self_attn: attention drops pairs.*model.eval\(\)"):
        with clinattn.explain(layer):
            layer(torch.randn(2, 5, 16))


@pytest.mark.parametrize(
    "ask, error, message",
    [
        (lambda e, t: e.rollout(None), ValueError, "rollout of all tokens at once is N x N"),
        (lambda e, t: e.rollout(N), ValueError, "token: got 11, and sequence 0 has 11 tokens"),
        (lambda e, t: e.rollout([0]), ValueError, r"token: got shape \(1,\), expected \(2,\)"),
        (lambda e, t: e.rollout(1.5), TypeError, "token: got float"),
        (lambda e, t: e.rollout(torch.rand(2)), TypeError, "token: got torch.float32"),
        (lambda e, t: e.rollout(0, 1.5), ValueError, "residual: got 1.5, expected 0 to 1"),
        (lambda e, t: e.rollout(0, heads=[4]), ValueError, r"heads: got \[4\], expected some"),
        (lambda e, t: e.received(heads="max"), ValueError, "heads: got 'max'"),
        (lambda e, t: e.received(torch.rand(3)), ValueError, r"weights: got shape \(3,\)"),
        (lambda e, t: e.topk(0, 17), ValueError, "k: got 17, expected 1 to 16"),
        (lambda e, t: e.topk("mean"), TypeError, "token: got 'mean'"),
        (lambda e, t: e.relevance(1.0), TypeError, "target: got float"),
        (lambda e, t: e.relevance(torch.rand(2)), ValueError, "target: has no gradient"),
        (
            lambda e, t: e.relevance(torch.ones(2, requires_grad=True)), ValueError,
            "target: depends on 0 of the 3 layers",
        ),
        (lambda e, t: e.token_read(t[:, 3:5]), ValueError, "token: got None, and the target"),
    ],
)  # fmt: skip
def test_refusals(ask, error, message):
    model = Stack()
    with clinattn.explain(model) as e:
        out = model(torch.randn(2, N, WIDTH).double())
    with pytest.raises(error, match=message):
        ask(e, out)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3,), TypeError, "model: got int"),
        ((nn.Linear(2, 2), 3), TypeError, "layers: got 3"),
        ((nn.Linear(2, 2), []), ValueError, r"layers: got \[\]"),
        ((nn.Linear(2, 2), [-1]), ValueError, r"layers: got \[-1\]"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        clinattn.explain(*arguments)
