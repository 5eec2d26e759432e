"""Attention under torch.func, checkpointing and autocast, as training loops use them."""

from dataclasses import replace

import pytest
import torch
from encoders import BERT, LENGTHS, MODERN, cu_seqlens, make_batch, pack, seeded
from support import assert_close
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from clinattn import fused_attention, fused_attention_varlen, rotary
from clinattn.encoder import Encoder, SequenceClassifier, linear

# Compilers allocate through torch.empty themselves.
pytestmark = pytest.mark.unpoisoned

CONFIGS = {"modernbert": MODERN, "bert": BERT}


# torch.func


def per_sequence_loss(model):
    """(parameters, ids (N,), length, label) -> loss of one sequence, as for functional_call."""

    def loss(parameters, ids, length, label):
        batch = {"lengths": length[None], "layout": "padded", "labels": label[None]}
        return functional_call(model, parameters, (ids[None],), batch).loss

    return loss


@pytest.mark.parametrize("name", CONFIGS)
def test_per_sample_gradients_of_a_model(name):
    """vmap(grad) over functional_call gives the gradients of each sequence alone."""
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


# The tensors kept between the passes


def gradients(model, context=None):
    """Returns loss and every parameter's gradient of a step on a ragged batch, padded."""
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
def test_selective_checkpointing_computes_attention_once(name, monkeypatch):
    monkeypatch.setattr(linear, "_form", lambda *call: None)  # as under its modes
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
