"""nn.MultiheadAttention on clinattn: output, gradients, masks, dropout, weights and errors."""

import copy
import functools
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from support import assert_close, dtype_id
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_nn_modules import BATCH, EMBED, HEADS, NK, NQ, adapted, spied

from clinattn import fused_attention
from clinattn.integrations.torch import modules as torch_nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched", "ignore:enable_nested_tensor", "ignore:The PyTorch API of nes"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def calls(monkeypatch):
    return spied(monkeypatch)


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
    plain = functools.partial(run, module, inputs, masks, cotangent=cotangent, need_weights=False)
    truth = plain(dtype=torch.float64)
    # fp64, as exact as its yardstick, is held against errors in fp32, less by the ratio of units.
    rounded = torch.float32 if dtype == torch.float64 else dtype
    naive = [plain(dtype=rounded)]
    with sdpa_kernel(SDPBackend.MATH):
        naive.append(plain(dtype=rounded))
    assert not calls
    actual = run(adapted(module), inputs, masks, dtype, cotangent, need_weights=False)
    assert len(calls) == 1
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        ratio = torch.finfo(dtype).eps / torch.finfo(rounded).eps
        errors = [n[name].double() - truth[name] for n in naive]
        assert_close(name, x, truth[name], *(truth[name] + ratio * e for e in errors))


def test_floating_masks_have_gradients():
    call = Call("", {}, ("padding:float", "3d:float"))
    module, inputs, masks = call.draw(torch.float64)
    grads = []
    for m in (module, adapted(module)):
        leaves = {n: x.double().requires_grad_() for n, x in masks.items()}
        o = m(*inputs * 3, need_weights=False, **leaves)[0]
        grads.append(torch.autograd.grad(o.pow(2).sum(), list(leaves.values())))
    torch.testing.assert_close(*grads)


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
def test_attention_with_masks_compiles_into_one_graph():
    module, inputs, masks = Call("", {"add_zero_attn": True}, ("hint", "right")).draw(torch.float32)
    module = adapted(module)
    f = lambda x, **masks: module(x, x, x, need_weights=False, **masks)[0]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs[0], **masks), f(inputs[0], **masks))


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
