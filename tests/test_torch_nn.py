"""torch.nn's modules after adapt: the same meaning, parameters, hooks and files, by clinattn."""

import copy
import io
import pickle
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from support import assert_close, dtype_id
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from clinattn import fused_attention
from clinattn.integrations import multihead, torch_nn
from clinattn.integrations.torch_nn import adapt, restore

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched", "ignore:enable_nested_tensor", "ignore:The PyTorch API of nes"
)

BATCH, NQ, NK, EMBED, HEADS = 3, 13, 17, 24, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def calls(monkeypatch):
    """What fused_attention was called with."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return fused_attention(*args, **kwargs)

    monkeypatch.setattr(multihead, "fused_attention", spy)
    return seen


def adapted(module):
    other = copy.deepcopy(module)
    assert adapt(other).replaced
    return other


@dataclass(frozen=True)
class Call:
    """of: what is attended to: the query itself, one other tensor, or a key and a value."""

    name: str
    module: dict = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    of: str = "itself"
    batched: bool = True

    def __str__(self):
        return self.name

    def draw(self, dtype):
        module = nn.MultiheadAttention(EMBED, HEADS, **self.module)
        for name, x in module.named_parameters():
            if "bias" in name:
                nn.init.normal_(x)
        batch_first, n_keys = module.batch_first, NQ if self.of == "itself" else NK

        def tokens(n, width):
            x = torch.randn(BATCH, n, width) if self.batched else torch.randn(n, width)
            return x.to(dtype) if batch_first or not self.batched else x.to(dtype).transpose(0, 1)

        inputs = [tokens(NQ, EMBED)]
        if self.of != "itself":
            inputs.append(tokens(n_keys, module.kdim))
        if self.of == "key and value":
            inputs.append(tokens(n_keys, module.vdim))
        return module.to(dtype), inputs, self.draw_masks(n_keys)

    def draw_masks(self, n_keys):
        given = {}
        for word in self.masks:
            kind, _, as_float = word.partition(":")
            if kind in ("causal", "hint"):
                mask = torch.ones(NQ, n_keys).triu(1).bool()
                given["is_causal"] = kind == "hint"
            else:
                mask = torch.rand({
                    "padding": (BATCH, n_keys),
                    "right": (BATCH, n_keys),
                    "2d": (NQ, n_keys),
                    "3d": (BATCH * HEADS if self.batched else HEADS, NQ, n_keys),
                }[kind]) < 0.4  # fmt: skip
                if kind == "right":
                    mask = torch.arange(n_keys) >= torch.tensor([[n_keys], [5], [1]])
                mask[..., 0] = False
            if as_float:
                mask = torch.randn(mask.shape).masked_fill(mask, -float("inf"))
            if kind in ("padding", "right"):
                given["key_padding_mask"] = mask if self.batched else mask[0]
            else:
                given["attn_mask"] = mask
        return given


def to_dtype(masks, dtype):
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in masks.items()
    }


def run(module, inputs, masks, dtype, cotangent, **more):
    """Output and the gradient of every input and parameter."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    q, k, v = [*inputs, inputs[-1], inputs[-1]][:3] if len(inputs) < 3 else inputs
    o, _ = module(q, k, v, **to_dtype(masks, dtype), **more)
    leaves = {f"input{i}": x for i, x in enumerate(inputs)} | dict(module.named_parameters())
    grads = torch.autograd.grad(o, list(leaves.values()), cotangent.to(dtype))
    return {"o": o.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


CALLS = [
    Call("plain"),
    Call("batch first", {"batch_first": True}),
    Call("no bias", {"batch_first": True, "bias": False}),
    Call("unbatched", batched=False),
    Call("unbatched batch first", {"batch_first": True}, ("padding", "3d"), batched=False),
    Call("cross", {"batch_first": True}, of="memory"),
    Call("cross seq first no bias", {"bias": False}, ("padding", "2d"), of="memory"),
    Call("three inputs", {}, ("3d",), of="key and value"),
    Call("kdim vdim", {"kdim": 10, "vdim": 14}, ("padding",), of="key and value"),
    Call("kdim vdim no bias", {"kdim": 10, "vdim": 14, "bias": False}, of="key and value"),
    Call("padding", {"batch_first": True}, ("padding",)),
    Call("padding float", {}, ("padding:float",)),
    Call("right padding", {"batch_first": True}, ("right",)),
    Call("mask 2d", {}, ("2d",)),
    Call("mask 2d float", {"batch_first": True}, ("2d:float",)),
    Call("mask 3d", {"batch_first": True}, ("3d",)),
    Call("mask 3d float", {}, ("3d:float",)),
    Call("padding and 2d", {}, ("padding", "2d")),
    Call("right padding and 2d", {"batch_first": True}, ("right", "2d")),
    Call("right padding and 3d float", {}, ("right", "3d:float")),
    Call("padding and 2d float", {}, ("padding", "2d:float")),
    Call("padding float and 3d", {}, ("padding:float", "3d")),
    Call("both float", {}, ("padding:float", "3d:float")),
    Call("causal", {}, ("causal",)),
    Call("causal hint", {"batch_first": True}, ("hint",)),
    Call("causal hint and padding", {}, ("hint", "right")),
    Call("causal hint cross", {}, ("hint",), of="memory"),
    Call("bias kv", {"add_bias_kv": True}),
    Call("zero attn", {"add_zero_attn": True, "batch_first": True}, ("padding",)),
    Call("both appended", {"add_bias_kv": True, "add_zero_attn": True}, ("padding", "3d:float")),
    Call("appended right", {"add_bias_kv": True, "batch_first": True}, ("right", "2d")),
    Call("appended causal hint", {"add_bias_kv": True}, ("hint",)),
    Call("appended causal hint and padding", {"add_zero_attn": True}, ("hint", "right")),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_output_and_gradients_are_those_of_torch(call, dtype, calls):
    module, inputs, masks = call.draw(dtype)
    masks = to_dtype(masks, dtype)
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float64).to(dtype)
    arguments = (inputs, masks)
    truth = run(module, *arguments, torch.float64, cotangent, need_weights=False)
    naive = [run(module, *arguments, dtype, cotangent, need_weights=False)]
    with sdpa_kernel(SDPBackend.MATH):
        naive.append(run(module, *arguments, dtype, cotangent, need_weights=False))
    assert not calls
    actual = run(adapted(module), *arguments, dtype, cotangent, need_weights=False)
    assert len(calls) == 1
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        assert_close(name, x, truth[name], *(n[name] for n in naive))


def test_floating_masks_have_gradients():
    call = Call("", {}, ("padding:float", "3d:float"))
    module, inputs, masks = call.draw(torch.float64)
    grads = []
    for m in (module, adapted(module)):
        leaves = {n: x.double().requires_grad_() for n, x in masks.items()}
        o = m(*inputs * 3, need_weights=False, **leaves)[0]
        grads.append(torch.autograd.grad(o.pow(2).sum(), list(leaves.values())))
    torch.testing.assert_close(*grads)


# What is handed to the kernels


def test_padding_alone_is_read_as_keys(calls):
    module, inputs, masks = Call("", {"batch_first": True}, ("padding",)).draw(torch.float32)
    adapted(module)(*inputs * 3, need_weights=False, **masks)
    assert calls[0]["attn_mask"].shape == (BATCH, 1, 1, NQ)


def test_right_padding_leaves_a_mask_as_it_is(calls):
    module, inputs, masks = Call("", {"batch_first": True}, ("right", "2d")).draw(torch.float32)
    adapted(module)(*inputs * 3, need_weights=False, **masks)
    assert calls[0]["attn_mask"].shape == (NQ, NQ)
    assert calls[0]["kv_lengths"].tolist() == [NQ, 5, 1]


@pytest.mark.parametrize("padding", [(), ("right",)], ids=["alone", "padded"])
def test_causal_hint_is_believed(padding, calls):
    """The mask it is about is not read."""
    module, inputs, masks = Call("", {}, ("hint", *padding)).draw(torch.float32)
    module = adapted(module)
    expected = module(*inputs * 3, need_weights=False, **masks)[0]
    masks["attn_mask"] = torch.full((NQ, NQ), float("nan"))
    assert torch.equal(module(*inputs * 3, need_weights=False, **masks)[0], expected)
    assert calls[1]["is_causal"]


def test_dropout_is_that_of_fused_attention():
    module = adapted(nn.MultiheadAttention(EMBED, HEADS, dropout=0.5, batch_first=True))
    x = torch.randn(BATCH, NQ, EMBED)
    torch.manual_seed(5)
    actual = module(x, x, x, need_weights=False)[0]
    projected = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = projected.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    torch.manual_seed(5)
    o = fused_attention(q, k, v, dropout_p=0.5).transpose(1, 2).flatten(2)
    assert torch.equal(actual, module.out_proj(o))
    module.eval()
    outputs = [module(x, x, x, need_weights=False)[0] for _ in range(2)]
    assert torch.equal(*outputs) and not torch.equal(actual, outputs[0])


def test_query_without_keys_returns_the_bias_of_out_proj():
    module = adapted(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    nn.init.normal_(module.out_proj.bias)
    x = torch.randn(BATCH, NQ, EMBED, requires_grad=True)
    hidden = torch.zeros(BATCH, NQ, dtype=torch.bool)
    hidden[1] = True
    o = module(x, x, x, hidden, need_weights=False)[0]
    assert torch.equal(o[1], module.out_proj.bias.expand(NQ, EMBED))
    o[1].sum().backward()
    assert (x.grad == 0).all()


def test_nan_in_padding_reaches_no_other_token():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0), 2)
    model = adapted(model)
    x = torch.randn(NQ, BATCH, EMBED)
    hidden = torch.arange(NQ) >= torch.tensor([[NQ], [5], [1]])
    clean, dirty = (
        model(x.masked_fill(hidden.T[..., None], fill), src_key_padding_mask=hidden)[~hidden.T]
        for fill in (0.0, float("nan"))
    )
    assert torch.equal(clean, dirty)


# Attention weights


def test_weights_come_from_torch_with_one_warning(monkeypatch, calls):
    monkeypatch.setattr(torch_nn, "_warned", False)
    module, inputs, masks = Call("", {}, ("padding", "2d")).draw(torch.float32)
    other = adapted(module)
    for more in ({}, {"average_attn_weights": False}):
        expected = module(*inputs * 3, **masks, **more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = other(*inputs * 3, **masks, **more)
        assert all(map(torch.equal, actual, expected))
        told = [w for w in caught if "need_weights" in str(w.message)]
        assert len(told) == (0 if more else 1)
        assert all(w.filename == __file__ or "module.py" in w.filename for w in told)
    assert not calls


# Layers and stacks


def encoder(**options):
    norm = nn.LayerNorm(EMBED)
    nn.init.normal_(norm.bias)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, norm)


LAYER = {
    "relu": {},
    "gelu": {"activation": "gelu"},
    "norm first": {"norm_first": True},
    "no bias": {"bias": False},
    "sequence first": {"batch_first": False},
}
PADDING = {
    "none": None,
    "right": torch.arange(NQ) >= torch.tensor([[NQ], [5], [1]]),
    "left": torch.arange(NQ) < torch.tensor([[0], [5], [1]]),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "mask, padding",
    [
        ("none", "none"), ("none", "right"), ("none", "left"), ("causal", "none"),
        ("causal", "right"), ("other", "none"), ("other", "right"), ("other", "left"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", LAYER)
def test_encoder_is_that_of_torch(options, mask, padding, training, gradients, calls):
    """In every mode, zeros in padding included; the attention is ours where torch fuses it."""
    model = encoder(**LAYER[options]).double().train(training)
    x = torch.randn(BATCH, NQ, EMBED, dtype=torch.float64)
    x = x if LAYER[options].get("batch_first", True) else x.transpose(0, 1)
    other = torch.rand(NQ, NQ) < 0.4
    other[:, [0, -1]] = False
    masks = {"none": None, "causal": torch.ones(NQ, NQ).triu(1).bool(), "other": other}
    hidden = PADDING[padding]
    with torch.set_grad_enabled(gradients):
        expected, actual = (
            m(x, mask=masks[mask], src_key_padding_mask=hidden) for m in (model, adapted(model))
        )
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    assert len(calls) == 2
    assert all(c["is_causal"] == (mask == "causal") for c in calls)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_transformer_with_all_masks(batch_first, calls):
    model = nn.Transformer(EMBED, HEADS, 2, 2, 32, 0.0, batch_first=batch_first).double()
    src, tgt = torch.randn(BATCH, NK, EMBED).double(), torch.randn(BATCH, NQ, EMBED).double()
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    lengths = torch.tensor([[NQ], [5], [1]])
    masks = {
        "src_mask": torch.rand(NK, NK) < 0.3,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(NQ).double(),
        "memory_mask": torch.rand(NQ, NK) < 0.3,
        "src_key_padding_mask": torch.arange(NK) >= lengths,
        "tgt_key_padding_mask": torch.arange(NQ) >= lengths,
        "memory_key_padding_mask": torch.arange(NK) >= lengths,
    }
    for name in ("src_mask", "memory_mask"):
        masks[name][:, 0] = False
    results = []
    for m in (model, adapted(model)):
        leaves = [src.detach().requires_grad_(), tgt.detach().requires_grad_()]
        o = m(*leaves, **masks)
        grads = torch.autograd.grad(o.pow(2).sum(), [*leaves, *m.parameters()])
        results.append([o, *grads])
    assert len(calls) == 2 + 2 * 2
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_layer_of_another_kind_still_gets_floating_masks():
    class Additive(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            assert src_key_padding_mask.is_floating_point()
            return src + src_key_padding_mask[..., None].exp()

    model = nn.TransformerEncoder(Additive(EMBED, HEADS, 32, batch_first=True), 2)
    outcome = adapt(model)
    assert not outcome.replaced and "layers.0: Additive has a forward of its own" in outcome.detail
    x, hidden = torch.randn(BATCH, NQ, EMBED), PADDING["right"]
    torch.testing.assert_close(model(x, src_key_padding_mask=hidden), x + 2.0 * ~hidden[..., None])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nested_tensors(layout, training):
    model = adapted(encoder()).train(training)
    parts = [torch.randn(n, EMBED) for n in (NQ, 1, 5)]
    expected = [model(x[None])[0] for x in parts]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    actual = model(nested)
    assert actual.is_nested and actual.layout == layout
    for x, y in zip(actual.unbind(), expected, strict=True):
        torch.testing.assert_close(x, y)
    sum(x.sum() for x in actual.unbind()).backward()
    assert nested.grad.is_nested


# What stays


def test_state_dicts_go_both_ways():
    theirs = nn.Transformer(EMBED, HEADS, 1, 1, 32)
    ours = copy.deepcopy(theirs)
    before = list(ours.named_parameters())
    assert adapt(ours).replaced
    assert all(a is b for (_, a), (_, b) in zip(before, ours.named_parameters(), strict=True))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in ((theirs, ours), (ours, theirs)):
        for x in a.parameters():
            nn.init.normal_(x)
        b.load_state_dict(a.state_dict())
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved, copy.copy],
    ids=["deepcopy", "pickle", "torch.save", "copy"],
)  # fmt: skip
def test_copies_use_clinattn_too(copied, calls):
    model = adapted(encoder())
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    x = torch.randn(BATCH, NQ, EMBED)
    assert torch.equal(other(x), model(x))
    assert len(calls) == 4


def test_hooks_run_once_and_do_not_turn_clinattn_off(calls):
    model = encoder().eval()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
            module.register_forward_hook(lambda *_, name=name: seen.append(f"after {name}"))
            module.register_full_backward_hook(lambda *_, name=name: seen.append(f"grad {name}"))
    adapt(model)
    x = torch.randn(BATCH, NQ, EMBED, requires_grad=True)
    with torch.no_grad():
        model(x)
    layer = ("before {}", "before {}.self_attn", "after {}.self_attn", "after {}")
    forward = [word.format(f"layers.{i}") for i in (0, 1) for word in layer]
    assert seen == forward and len(calls) == 2
    model(x).sum().backward()
    layers = ("layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn")
    assert sorted(seen[8:]) == sorted([*forward, *(f"grad {name}" for name in layers)])


def test_restore_gives_the_old_classes_back(calls):
    model = nn.Transformer(EMBED, HEADS, 1, 1, 32, batch_first=True)
    before = [type(m) for m in model.modules()]
    assert adapt(model) == adapt(model)
    assert [type(m) for m in model.modules()] != before
    restore(model)
    assert [type(m) for m in model.modules()] == before
    model(torch.randn(BATCH, NK, EMBED), torch.randn(BATCH, NQ, EMBED))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast(dtype, calls):
    module, inputs, masks = Call("", {"batch_first": True}, ("padding", "2d")).draw(torch.float32)
    with torch.autocast("cpu", dtype):
        expected, actual = (
            m(*inputs * 3, need_weights=False, **masks)[0] for m in (module, adapted(module))
        )
    assert actual.dtype == expected.dtype == dtype and len(calls) == 1
    truth = module.double()(*[inputs[0].double()] * 3, need_weights=False, **masks)[0]
    assert_close("o", actual, truth, expected)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ["train", "eval without gradients"])
def test_compiles_into_one_graph(mode):
    model = adapted(encoder()).train(mode == "train")
    x, hidden = torch.randn(BATCH, NQ, EMBED), PADDING["left"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        for masks in ({}, {"src_key_padding_mask": hidden}):
            torch.testing.assert_close(compiled(x, **masks), model(x, **masks))


@pytest.mark.unpoisoned
def test_attention_with_masks_compiles_into_one_graph():
    module, inputs, masks = Call("", {"add_zero_attn": True}, ("hint", "right")).draw(torch.float32)
    module = adapted(module)
    f = lambda x, **masks: module(x, x, x, need_weights=False, **masks)[0]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs[0], **masks), f(inputs[0], **masks))


# What is not replaced


class Renamed(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(EMBED, HEADS)


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnBlock(nn.TransformerEncoderLayer):
    def _sa_block(self, x, *args, **kwargs):
        return x


def replaced_on_the_instance():
    module = nn.MultiheadAttention(EMBED, HEADS)
    module.forward = lambda *args, **kwargs: None
    return module


def test_subclass_that_keeps_forward_is_adapted(calls):
    module = Renamed()
    assert adapt(module).replaced and isinstance(module, Renamed)
    other = copy.deepcopy(module)
    assert type(other) is type(module)
    other(*[torch.randn(NQ, EMBED)] * 3, need_weights=False)
    assert len(calls) == 1
    restore(module)
    assert type(module) is Renamed


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: OwnForward(EMBED, HEADS), "OwnForward has a forward of its own"),
        (lambda: OwnBlock(EMBED, HEADS), "OwnBlock has a _sa_block of its own"),
        (replaced_on_the_instance, "forward was replaced on this MultiheadAttention"),
        (lambda: nn.MultiheadAttention(600, 2), "head_dim is 300, at most 256"),
        (lambda: parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
         "ParametrizedMultiheadAttention is parametrized"),
        (lambda: torch.jit.script(nn.MultiheadAttention(8, 2)), "compiled by torch.jit"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(8, 2), "has a forward of its own"),
    ],
    ids=["forward", "_sa_block", "instance", "head_dim", "parametrized", "scripted", "quantizable"],
)  # fmt: skip
def test_what_cannot_be_replaced_is_said_and_left(make, why):
    module = make()
    before = type(module)
    outcome = adapt(module)
    assert not outcome.replaced and why in outcome.detail
    assert type(module) is before


def test_parametrized_afterwards_cannot_be_restored_before_that_is_undone():
    module = adapted(nn.MultiheadAttention(8, 2))
    parametrizations.weight_norm(module, "in_proj_weight")
    with pytest.raises(ValueError, match="expected that to be undone first"):
        restore(module)
    torch.nn.utils.parametrize.remove_parametrizations(module, "in_proj_weight")
    restore(module)
    assert type(module) is nn.MultiheadAttention


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.MultiheadAttention(8, 2))])
def test_others_are_none_of_its_business(module):
    assert adapt(module) is None
    assert not any(isinstance(m, torch_nn.FusedMultiheadAttention) for m in module.modules())


def nested(*lengths):
    return torch.nested.nested_tensor([torch.randn(n, EMBED) for n in lengths])


X = torch.randn(NQ, BATCH, EMBED)


@pytest.mark.parametrize(
    "inputs, more, error, words",
    [
        ((X, X[0], X), {}, ValueError, "got 3, 2, 3 dimensions"),
        ((X[None],) * 3, {}, ValueError, "got 4, 4, 4 dimensions"),
        ((X[..., :8],) * 3, {}, ValueError, "got 8 features, expected 24"),
        ((X,) * 3, {"is_causal": True}, ValueError, "without attn_mask"),
        ((X,) * 3, {"attn_mask": torch.zeros(NQ, NK).bool()}, ValueError, r"got shape \(13, 17\)"),
        ((X,) * 3, {"attn_mask": torch.zeros(5, NQ, NQ)}, ValueError, r"got shape \(5, 13, 13\)"),
        ((X,) * 3, {"attn_mask": torch.zeros(NQ, NQ).int()}, TypeError, "got torch.int32"),
        ((X,) * 3, {"key_padding_mask": torch.zeros(NQ, BATCH)}, ValueError, "expected .3, 13"),
        ((X[:, 0],) * 3, {"key_padding_mask": torch.zeros(1, NQ)}, ValueError, "got shape"),
        ((nested(2, 3),) * 3, {"key_padding_mask": torch.zeros(2, 3)}, ValueError, "got a mask"),
        ((nested(2, 3), X, X), {}, ValueError, "expected all or none"),
        ((nested(2, 3), nested(2, 3), nested(3, 2)), {}, ValueError, "value: got lengths"),
    ],
    ids=["ranks", "4d", "features", "hint alone", "2d", "3d", "int", "padding", "unbatched padding",
         "nested mask", "nested and not", "nested lengths"],
)  # fmt: skip
def test_bad_input_is_refused(inputs, more, error, words):
    module = adapted(nn.MultiheadAttention(EMBED, HEADS))
    with pytest.raises(error, match=words):
        module(*inputs, need_weights=False, **more)
