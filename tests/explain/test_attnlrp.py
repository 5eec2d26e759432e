"""AttnLRP: against its rules written out, what it conserves, activations, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from attributed import CONFIGS, MODERN, SMALL, N, classifier
from explained import assert_equal
from torch import nn

import clinattn
from clinattn.encoder import EncoderConfig
from clinattn.explain import gradients, rules


# The rules of the paper in plain torch: constants by detach, halves by a mixed copy.
def halved(x, by=2):
    return x / by + (x - x / by).detach()


def identity_rule(act, x):
    return x * (act(x) / x).detach()


def norm_rule(norm, x):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    x = x * norm.weight
    return x if norm.bias is None else x + norm.bias


class DenseLRP:
    """SequenceClassifier on one sequence, in whole matrices, with the rules written out.

    absorbed: what softmax does not hand on, from the matrices of each layer, once differentiated.
    """

    def __init__(self, model):
        self.model, self.config = model, model.encoder.config
        self.scores, self.outputs = [], []

    def attend(self, block, x, index):
        attention, heads = block.attention, self.config.num_heads
        q, k, v = attention.qkv(x).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        if self.config.rotary:
            base = self.config.rotary_base
            base = self.config.rotary_base_window if attention.window is not None else base
            pair = torch.arange(q.shape[-1] // 2, dtype=torch.float64)
            angle = torch.arange(len(x))[:, None] * base ** (-2 * pair / q.shape[-1])
            q, k = (self.turn(y, angle) for y in (q, k))
        s = halved(q @ k.mT) * q.shape[-1] ** -0.5
        if attention.window is not None:
            at = torch.arange(len(x))
            s = s.masked_fill((at[:, None] - at).abs() > attention.window, -torch.inf)
        self.scores.append(s)
        o = halved(s.softmax(-1) @ v)
        self.outputs.append(o)
        return attention.out(o.transpose(0, 1).flatten(1))

    def turn(self, x, angle):
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def feed(self, block, x):
        u = block.feed_forward.up(x)
        if block.feed_forward.gated:
            u, gate = u.chunk(2, -1)
            return block.feed_forward.down(halved(identity_rule(F.gelu, u) * gate))
        return block.feed_forward.down(identity_rule(F.gelu, u))

    def norm(self, norm, x):
        return x if isinstance(norm, nn.Identity) else norm_rule(norm, x)

    def logits(self, x):
        for index, block in enumerate(self.model.encoder.layers):
            if block.pre_norm:
                x = x + self.attend(block, self.norm(block.attention_norm, x), index)
                x = x + self.feed(block, self.norm(block.feed_forward_norm, x))
            else:
                x = norm_rule(block.attention_norm, x + self.attend(block, x, index))
                x = norm_rule(block.feed_forward_norm, x + self.feed(block, x))
        x = self.norm(self.model.encoder.final_norm, x)[0]
        head = self.model.head
        x = identity_rule(F.gelu if len(head) == 3 else torch.tanh, head[0](x))
        return self.model.classifier(norm_rule(head[2], x) if len(head) == 3 else x)


def differentiated(dense, x, target):
    score = dense.logits(x)[target]
    return score, torch.autograd.grad(score, [x, *dense.scores, *dense.outputs])


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_attnlrp_equals_its_rules_written_out(name):
    model = classifier(CONFIGS[name], torch.float64)
    ids = torch.randint(1, 50, (1, N))
    embedded = gradients.Embedded(model, {"inputs": ids}, model.encoder.embeddings)
    _, x = embedded.leaf()
    _, grads = differentiated(DenseLRP(model), x, 1)
    scores = clinattn.attribute(model, {"inputs": ids}, 1)
    plain = clinattn.attribute(model, {"inputs": ids}, 1, "gradient_x_input")
    expected = (x * grads[0]).sum(-1).detach()
    assert_equal("attnlrp", scores[0], expected, 100 * N * SMALL["num_layers"])
    assert float((scores - plain).abs().max()) > 1e-3 * float(plain.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attnlrp_conserves_all_but_what_softmax_absorbs(dtype):
    """Without biases, the sum of relevance is the logit less what each softmax has absorbed.

    Softmax is no linear function: of the half that its output p has of the relevance at o, its
    input s gets sum s ds, and the rest is that of the constant in its expansion (section 3.3.1 of
    the paper). fp32 goes through compiled linear layers, if they are there.
    """
    config = EncoderConfig(**{**vars(MODERN), "linear_bias": False, "norm_bias": False})
    model = classifier(config, torch.float64)
    nn.init.zeros_(model.classifier.bias)
    ids = torch.randint(1, 50, (1, N))
    _, x = gradients.Embedded(model, {"inputs": ids}, model.encoder.embeddings).leaf()
    dense = DenseLRP(model)
    logit, (_, *grads) = differentiated(dense, x, 1)
    layers = SMALL["num_layers"]
    absorbed = 0.0
    for s, ds, o, do in zip(
        dense.scores, grads[:layers], dense.outputs, grads[layers:], strict=True
    ):
        absorbed += float((o * do).sum() / 2 - (s.masked_fill(s.isinf(), 0) * ds).sum())
    scores = clinattn.attribute(model.to(dtype), {"inputs": ids}, 1)
    size = float(scores.abs().sum()) + abs(absorbed)
    error = abs(float(scores.sum()) + absorbed - float(logit.detach()))
    assert error <= 100 * N * layers * torch.finfo(dtype).eps * size
    assert abs(absorbed) > 1e-3 * abs(float(logit.detach()))


def test_attnlrp_conserves_without_attention():
    """Activations, norms, gates and linear layers hand on all that they get."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 12)
            self.up, self.down = nn.Linear(12, 32, False), nn.Linear(16, 12, False)
            self.norms = nn.ModuleList([nn.LayerNorm(12, bias=False), nn.RMSNorm(12)])
            self.out = nn.Linear(12, 2, False)

        def forward(self, ids):
            x = self.embed(ids)
            for norm, act in zip(self.norms, (F.silu, torch.tanh), strict=True):
                a, gate = self.up(norm(x)).chunk(2, -1)
                x = x + self.down(act(a) * gate).relu()
            return self.out(x.mean(1))

    model = Gated().double().eval()
    ids = torch.randint(20, (4, 7))
    scores = clinattn.attribute(model, {"ids": ids}, 1, embeddings=model.embed)
    assert_equal("sum", scores.sum(1), model(ids)[:, 1].detach(), 100)


WRITTEN_OUT = {
    "gelu": (lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)), F.gelu),
    "gelu of GPT-2": (
        lambda x: 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3.0)))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu, its cube of products": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * (2 / torch.pi) ** 0.5 * (1 + 0.044715 * x * x))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "silu, its factors changed about": (lambda x: torch.sigmoid(x) * x, F.silu),
    "square of relu": (lambda x: x.relu() ** 2, lambda x: x.relu() * x.relu().detach()),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_an_activation_that_is_written_out_has_the_rule_of_the_function(name):
    class Plain(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act = act
            self.embed, self.norm = nn.Embedding(20, 12), nn.LayerNorm(12)
            self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 2)

        def forward(self, ids):
            return self.down(self.act(self.up(self.norm(self.embed(ids))))).mean(1)

    written_out, function = map(Plain, WRITTEN_OUT[name])
    function.load_state_dict(written_out.state_dict())
    ids = torch.randint(20, (4, 7))
    found, wanted = (
        clinattn.attribute(model.double().eval(), {"ids": ids}, 1, embeddings=model.embed)
        for model in (written_out, function)
    )
    assert_equal(name, found, wanted, 100)


def test_a_gate_of_another_input_is_no_activation():
    """Half of the relevance goes to either factor, though one is a function of single numbers: were
    it closed, the other would get all."""
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    a, b = x.chunk(2, -1)
    score = (a * torch.tanh(b)).sum()
    rules.apply(score, x)
    (grad,) = torch.autograd.grad(score, x)
    half = (a * torch.tanh(b) / 2).detach()
    assert_equal("gate", (x * grad).detach(), torch.cat((half, half), -1), 20)


def test_attnlrp_of_torchs_own_attention_is_that_of_ours():
    """The rules hold for torch's code and for ours after replace_attention."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, activation=F.gelu)
    model = nn.Sequential(nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))
    model = model.double().eval()
    given = {"input": torch.randint(20, (2, N))}
    explained = lambda: clinattn.attribute(
        model, given, lambda out: out[:, 0, 1], embeddings=model[0]
    )
    before = explained()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        written_out = explained()
    clinattn.replace_attention(model)
    assert_equal("ours", explained(), before, 100 * N)
    assert_equal("matrices", written_out, before, 100 * N)


def test_attnlrp_refuses_what_it_has_no_rule_for():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 4)

        def forward(self, ids):
            return self.embed(ids).sin().sum(1)

    model = Odd().eval()
    with pytest.raises(NotImplementedError, match="SinBackward0 in the model's graph has no rule"):
        clinattn.attribute(model, {"ids": torch.zeros(1, 2).long()}, 1, embeddings=model.embed)
