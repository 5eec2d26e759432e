"""What a training loop puts around attention: compiling, transforming, checkpointing, autocast."""

import copy
from dataclasses import replace

import pytest
import torch
from encoders import BERT, LENGTHS, MODERN, cu_seqlens, make_batch, pack, seeded
from support import assert_close
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from clinattn import FusedAttention, fused_attention, fused_attention_varlen, rotary
from clinattn.encoder import Encoder, SequenceClassifier

# Compilers allocate through torch.empty themselves.
pytestmark = pytest.mark.unpoisoned

CONFIGS = {"modernbert": MODERN, "bert": BERT}


class SelfAttention(nn.Module):
    """As written by hand, with key lengths, timestamps and dropout."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.decay = nn.Parameter(torch.rand(3))
        self.slopes = nn.Parameter(torch.rand(3))

    def forward(self, x, lengths, times):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).transpose(1, 3).unbind(2)
        o = fused_attention(
            q, k, v, kv_lengths=lengths, q_lengths=lengths, times=times, time_decay=self.decay,
            alibi_slopes=self.slopes, softcap=9.0, dropout_p=0.1 * self.training,
        )  # fmt: skip
        return x + self.out(o.transpose(1, 2).flatten(2))


class TwoLayers(nn.Module):
    def __init__(self, autocast=False):
        super().__init__()
        self.layers = nn.ModuleList([SelfAttention(), SelfAttention()])
        self.autocast = autocast

    def forward(self, x, lengths, times):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            for layer in self.layers:
                x = layer(x, lengths, times)
        return x


@pytest.fixture
def inductor(tmp_path_factory, monkeypatch):
    """torch.compile by default: one graph or an error, with eager's random numbers."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"torch.compile finds no C++ compiler: {error}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(fallback_random=True):
        yield lambda model, **options: torch.compile(model, fullgraph=True, **options)
    torch._dynamo.reset()


def trained(call, model, weight, *args, **kwargs):
    """What a call returns and the gradients of all parameters, weighted by `weight`."""
    torch.manual_seed(1)
    out = call(*args, **kwargs)
    out = torch.where(weight == 0, 0, out)  # padding means nothing, and may hold anything
    return [out, *torch.autograd.grad((out * weight).sum(), list(model.parameters()))]


def compare(compiled, model, *args, weight, **kwargs):
    """Compiled as close to fp64 as eager is, with what dropout draws in eager."""
    exact = copy.deepcopy(model).double()
    exact.autocast = False
    doubled = [x.double() if x.is_floating_point() else x for x in args]
    actual = trained(compiled, model, weight, *args, **kwargs)
    eager = trained(model, model, weight, *args, **kwargs)
    truths = trained(exact, exact, weight.double(), *doubled, **kwargs)
    for i, (a, b, truth) in enumerate(zip(actual, eager, truths, strict=True)):
        assert a.dtype == b.dtype
        assert_close(str(i), a, truth, b)


def weights(lengths, *shape):
    """Random, and 0 in the padding."""
    real = torch.arange(shape[1]) < lengths[:, None]
    return torch.randn(shape) * real[..., None]


@pytest.mark.parametrize(
    "autocast, mode",
    [(True, None), (False, "reduce-overhead")],
    ids=["autocast", "reduce-overhead"],
)
def test_modules_compile_to_one_graph_for_every_length(autocast, mode, inductor):
    """Static modules, a length marked as dynamic; dropout draws what it draws in eager.

    reduce-overhead is for GPUs, and harmless on a CPU.
    """
    model = TwoLayers(autocast)
    compiled = inductor(model, mode=mode)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (33, 65, 17):
            x, times = torch.randn(2, n, 24), (torch.rand(2, n) * 9).sort(1)[0]
            lengths = torch.tensor([n, n // 2])
            for padded in (x, times):
                torch._dynamo.mark_dynamic(padded, 1)
            compare(compiled, model, x, lengths, times, weight=weights(lengths, *x.shape))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "layout, backend, windows",
    [
        ("padded", "inductor", (5,)),
        ("padded", "aot_eager", (None, 5)),
        ("packed", "aot_eager", (None, 5)),
        ("given packed", "aot_eager", (None, 5)),
    ],
)
def test_encoders_compile_to_one_graph_for_every_batch(layout, backend, windows, inductor):
    """All of an encoder in training, with its dropout; (B, N) is unpadded inside the graph."""
    config = replace(MODERN, num_layers=len(windows), windows=windows, attention_dropout=0.1)
    model = seeded(Encoder, config)
    compiled = inductor(model, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((33, 9), (5, 65, 30), (17, 2, 1, 7)):
            ids = torch.randint(0, 101, (len(lengths), max(lengths)))
            weight = weights(torch.tensor(lengths), *ids.shape, config.hidden_size)
            batch = {"lengths": torch.tensor(lengths), "layout": layout}
            if layout == "given packed":
                real = weight[..., 0] != 0
                ids, weight = ids[real], weight[real]
                batch = {"cu_seqlens": torch.tensor((0, *lengths)).cumsum(0).int()}
            compare(compiled, model, ids, weight=weight, **batch)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "words", [{}, {"scale": 0.3, "softcap": 3.0, "dropout_p": 0.1}], ids=["defaults", "floats"]
)
def test_calls_follow_each_other_under_dynamic_shapes(words):
    """torch.compile makes symbols of floats that it finds in modules, once for all calls."""
    torch._dynamo.reset()

    def call(q, k, v):
        return fused_attention(fused_attention(q, k, v, **words), k, v, **words)

    inputs = [torch.randn(2, 2, 40, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (compiled, call):
        torch.manual_seed(1)
        o = function(*inputs)
        results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)  # dk and dv of the calls are added in another order


def test_the_function_follows_itself_under_dynamic_shapes():
    torch._dynamo.reset()
    call = lambda q, k, v: FusedAttention.apply(FusedAttention.apply(q, k, v), k, v)
    inputs = [torch.randn(2, 2, 40, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*inputs), call(*inputs))


# torch.func


def per_sequence_loss(model):
    """(parameters, ids (N,), length, label) -> loss of one sequence, as for functional_call."""

    def loss(parameters, ids, length, label):
        batch = {"lengths": length[None], "layout": "padded", "labels": label[None]}
        return functional_call(model, parameters, (ids[None],), batch).loss

    return loss


@pytest.mark.parametrize("name", CONFIGS)
def test_per_sample_gradients_of_a_model(name):
    """vmap(grad) over functional_call: those of each sequence alone."""
    model = seeded(SequenceClassifier, CONFIGS[name], 3).double()
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    ids, lengths = make_batch()
    labels = torch.tensor([0, 1, 2, 1])
    loss = per_sequence_loss(model)
    actual = vmap(grad(loss), (None, 0, 0, 0))(parameters, ids, lengths, labels)
    for i, n in enumerate(LENGTHS):
        for key, expected in grad(loss)(parameters, ids[i, :n], lengths[i], labels[i]).items():
            torch.testing.assert_close(actual[key][i], expected, rtol=1e-9, atol=1e-12)


def doubles(*shape):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(3)]


def ours_and_plain():
    """A scalar function of q through the operator and through plain maths."""
    q, k, v = doubles(1, 2, 5, 4)
    hidden = ~torch.ones(5, 5).tril().bool()

    def plain(q):
        return (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    return q, (lambda q: fused_attention(q, k, v, is_causal=True)), plain


def test_jacobian_and_hessian_in_reverse_mode():
    q, ours, plain = ours_and_plain()
    torch.testing.assert_close(jacrev(ours)(q), jacrev(plain)(q))
    energy = lambda f: lambda q: f(q).square().sum()
    truth = jacrev(jacrev(energy(plain)))(q)
    torch.testing.assert_close(jacrev(jacrev(energy(ours)))(q), truth)
    torch.testing.assert_close(torch.autograd.functional.hessian(energy(ours), q), truth)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, q: jvp(f, (q,), (q,)),
        lambda f, q: jacfwd(f)(q),
        lambda f, q: hessian(lambda q: f(q).sum())(q),
    ],
    ids=["jvp", "jacfwd", "hessian"],
)
@pytest.mark.parametrize("op", ["attention", "rotary"])
def test_forward_mode_names_what_to_ask_for(op, transform):
    q, ours, _ = ours_and_plain()
    turn = lambda q: rotary(q, q, torch.arange(5))[0]
    with pytest.raises(NotImplementedError, match=r"no derivatives in forward mode.*jacrev\(jac"):
        transform(ours if op == "attention" else turn, q)


# What is kept between the passes


def gradients(model, context=None):
    """Of a training step on a ragged batch, padded: loss and every parameter's gradient."""
    torch.manual_seed(3)
    ids, lengths = make_batch()
    labels = torch.tensor([0, 1, 2, 1])
    if context is None:
        loss = model(ids, lengths=lengths, labels=labels).loss
    else:
        with context:
            loss = model(ids, lengths=lengths, labels=labels).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def checkpointed(model, **options):
    for layer in model.encoder.layers:
        layer.forward = lambda *args, forward=layer.forward: checkpoint(forward, *args, **options)
    return model


def model_with_dropout(name):
    config = replace(CONFIGS[name], attention_dropout=0.2, hidden_dropout=0.1)
    return seeded(SequenceClassifier, config, 3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_activation_checkpointing(name, reentrant):
    """Layers are computed twice, with the same dropout: the bits of training without it.

    autograd.grad stops a reentrant checkpoint, so gradients are accumulated.
    """
    expected = gradients(model_with_dropout(name))
    model = checkpointed(model_with_dropout(name), use_reentrant=reentrant)
    torch.manual_seed(3)
    ids, lengths = make_batch()
    loss = model(ids, lengths=lengths, labels=torch.tensor([0, 1, 2, 1])).loss
    loss.backward()
    for a, b in zip([loss, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_selective_checkpointing_computes_attention_once(name):
    forward = torch.ops.clinattn.attention_forward.default

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == forward else CheckpointPolicy.PREFER_RECOMPUTE

    ran = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func)
            return func(*args, **(kwargs or {}))

    contexts = lambda: create_selective_checkpoint_contexts(policy)
    expected = gradients(seeded(SequenceClassifier, CONFIGS[name], 3))
    model = checkpointed(
        seeded(SequenceClassifier, CONFIGS[name], 3), use_reentrant=False, context_fn=contexts
    )
    with Count():
        actual = gradients(model)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert ran.count(forward) == MODERN.num_layers
    assert ran.count(torch.ops.clinattn.attention_backward.default) == MODERN.num_layers


def test_saved_tensors_may_be_moved_away():
    """Packed by hooks, as for offloading: q, k, v and o of each layer among them."""
    expected = gradients(seeded(SequenceClassifier, BERT, 3))
    moved = []

    def away(x):
        moved.append(x.shape)
        return x.detach().numpy().copy()

    hooks = torch.autograd.graph.saved_tensors_hooks(away, torch.from_numpy)
    actual = gradients(seeded(SequenceClassifier, BERT, 3), hooks)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    heads = (sum(LENGTHS), BERT.num_heads, BERT.head_dim)
    assert moved.count(heads) == 4 * BERT.num_layers


def test_double_backward_through_an_encoder():
    """A gradient penalty on the embeddings; second derivatives against torch's own attention."""

    def penalty(attention):
        config = replace(BERT, attention=attention)
        model = seeded(Encoder, config).double()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            hidden = model(*make_batch()[:1], layout="padded")
            (first,) = torch.autograd.grad(
                hidden.sin().sum(), model.embeddings.tokens.weight, create_graph=True
            )
            return torch.autograd.grad(
                first.square().sum(), list(model.parameters()), allow_unused=True
            )

    for ours, theirs in zip(penalty("clinattn"), penalty("sdpa"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(name, dtype):
    """Gradients in fp32 of what ran in 16 bits, as far from the truth as torch's attention is."""

    def step(attention, low):
        config = replace(CONFIGS[name], attention=attention)
        model = seeded(SequenceClassifier, config, 3).to(torch.float32 if low else torch.float64)
        found = gradients(model, torch.autocast("cpu", dtype, enabled=low))
        return {str(i): x.detach() for i, x in enumerate(found)}

    ours, theirs, truth = step("clinattn", True), step("sdpa", True), step("sdpa", False)
    for key, expected in truth.items():
        assert ours[key].dtype == torch.float32
        assert_close(key, ours[key].to(dtype), expected, theirs[key])


def test_packed_is_padded_in_training():
    """The packed call under autocast and a checkpoint, held against the dense one."""
    x = torch.randn(sum(LENGTHS), 3, 3, 8, requires_grad=True)

    def call(x):
        return fused_attention_varlen(*x.unbind(1), cu_seqlens(), is_causal=True)

    with torch.autocast("cpu", torch.bfloat16):
        o = checkpoint(call, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(o.float().square().sum(), x)
    rows = torch.nn.utils.rnn.pad_sequence(x.detach().split(LENGTHS), True).requires_grad_()
    q, k, v = rows.bfloat16().permute(2, 0, 3, 1, 4)
    lengths = torch.tensor(LENGTHS)
    dense = fused_attention(q, k, v, is_causal=True, kv_lengths=lengths, q_lengths=lengths)
    (drows,) = torch.autograd.grad(dense.float().square().sum(), rows)
    assert torch.equal(o, pack(dense.transpose(1, 2)))
    assert torch.equal(dx, pack(drows))
