"""F.scaled_dot_product_attention by clinattn: activated in torch's registry, or in a block."""

import copy
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from sdpa_ways import WAYS, activated, both_ways
from support import backends_module
from torch import nn
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.functional import scaled_dot_product_attention as imported_early

from clinattn import fused_attention
from clinattn.integrations.torch import sdpa
from clinattn.integrations.torch.modules import adapt


class OtherTensor(torch.Tensor):
    """A subclass without code of its own."""


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(sdpa, "_warned", set())


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def qkv(heads=4, kv_heads=None, nq=13, nk=17, dim=16, dtype=torch.float32):
    kv = (2, kv_heads or heads, nk, dim)
    return tensors((2, heads, nq, dim), kv, kv, dtype=dtype)


def results(attention, inputs, **keywords):
    """Output and gradients, after the same seed."""
    torch.manual_seed(3)
    o = attention(*inputs, **keywords)
    leaves = [x for x in (*inputs, *keywords.values()) if getattr(x, "requires_grad", False)]
    return [o, *torch.autograd.grad(o.pow(2).sum(), leaves)]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def is_ours(call=lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)):
    """Returns whether a call gives the bits of clinattn, which differ from torch's."""
    inputs = qkv(nq=65, nk=65, dim=40)
    ours = fused_attention(*inputs, is_causal=True)
    return torch.equal(call(*inputs), ours)


def leaf(*shape):
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -float("inf")).requires_grad_()


KEYWORDS = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "scale": lambda: {"scale": 0.3},
    "dropout": lambda: {"dropout_p": 0.4},
    "bool mask": lambda: {"attn_mask": torch.rand(2, 1, 13, 17) < 0.6},
    "key mask": lambda: {"attn_mask": torch.rand(2, 1, 1, 17) < 0.6},
    "hidden rows": lambda: {"attn_mask": (torch.rand(13, 1) < 0.5).expand(13, 17)},
    "float mask with a gradient": lambda: {"attn_mask": leaf(4, 13, 17)},
    "mask and causal": lambda: {"attn_mask": torch.rand(13, 17) < 0.6, "is_causal": True},
    "grouped heads": lambda: {"enable_gqa": True},
    "everything": lambda: {
        "enable_gqa": True, "dropout_p": 0.1, "attn_mask": leaf(17), "scale": 0.2
    },
}  # fmt: skip


def in_one_mask(keywords):
    """The same call for torch's own function, which from 2.14 on refuses a mask with is_causal."""
    if not ("attn_mask" in keywords and "is_causal" in keywords):
        return keywords
    mask = keywords["attn_mask"]
    return keywords | {"attn_mask": mask.tril(), "is_causal": False}


@both_ways
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("words", KEYWORDS)
def test_bits_are_those_of_fused_attention(words, dtype, way):
    keywords = KEYWORDS[words]()
    mask = keywords.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        keywords["attn_mask"] = mask.detach().to(dtype).requires_grad_()
    inputs = qkv(kv_heads=2 if "enable_gqa" in keywords else None, dtype=dtype)
    expected = results(fused_attention, inputs, **keywords)
    with way(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for attention in (F.scaled_dot_product_attention, imported_early):
            assert same(results(attention, inputs, **keywords), expected)
    if "dropout_p" not in keywords:
        theirs = results(F.scaled_dot_product_attention, inputs, **in_one_mask(keywords))
        assert not same(theirs, expected) or words == "hidden rows"
        tolerance = {} if dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(theirs, expected, **tolerance)


@both_ways
@pytest.mark.parametrize("dims", [2, 3])
def test_fewer_dimensions(dims, way):
    inputs = [x[(0,) * (4 - dims)].detach().requires_grad_() for x in qkv()]
    mask = torch.rand(13, 17) < 0.6
    missing = (None,) * (4 - dims)
    direct = lambda q, k, v, m: fused_attention(q[missing], k[missing], v[missing], m).view_as(q)
    expected = results(direct, [*inputs, mask])
    with way():
        assert same(results(F.scaled_dot_product_attention, [*inputs, mask]), expected)


@both_ways
def test_query_without_keys_returns_zero(way):
    inputs = qkv()
    with way():
        o, *grads = results(
            F.scaled_dot_product_attention, inputs, attn_mask=torch.zeros(13, 17) > 0
        )
    assert all((x == 0).all() for x in (o, *grads))


@both_ways
def test_autocast_and_inference_mode(way):
    q, k, v = qkv()
    with way(), torch.autocast("cpu", torch.bfloat16):
        o = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(o, fused_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    with way(), torch.inference_mode():
        o = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(o, fused_attention(q, k, v))


# Where torch's own serves


@both_ways
def test_what_clinattn_does_not_take_is_torchs_after_a_warning(way):
    inputs = [x.as_subclass(OtherTensor) for x in tensors(*[(2, 3, 13, 8)] * 3)]
    expected = F.scaled_dot_product_attention(*inputs)
    with way():
        with pytest.warns(UserWarning, match="a nested tensor or tensor subclass was given"):
            actual = F.scaled_dot_product_attention(*inputs)
        assert torch.equal(actual, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.scaled_dot_product_attention(*inputs)


@both_ways
def test_what_torch_refuses_is_refused(way):
    q, k, v = qkv()
    for inputs, keywords in (
        ((q, k.double(), v), {}),
        ((q, k, v), {"dropout_p": 1.5}),
        ((q, k, v), {"attn_mask": torch.zeros(5, 5) > 0}),
        ((q[..., :8], k, v), {}),
        ((q, k, v), {"attn_mask": torch.zeros(13, 17, dtype=torch.int32)}),
    ):
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(*inputs, **keywords)
        with way(), warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(type(theirs.value)) as ours:
                F.scaled_dot_product_attention(*inputs, **keywords)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


@both_ways
def test_the_switches_of_torch_are_obeyed(way):
    inputs = qkv()
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(F.scaled_dot_product_attention, inputs)
    with way():
        with sdpa_kernel(SDPBackend.MATH):
            assert same(results(F.scaled_dot_product_attention, inputs), expected)
        assert same(
            results(F.scaled_dot_product_attention, inputs), results(fused_attention, inputs)
        )


# The reach of activating and of a block, and its end


def test_registry_lists_activates_and_restores():
    sdpa.register()
    assert "clinattn" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None and not is_ours()
    fast, tag = torch.backends.mha.get_fastpath_enabled(), torch.compiler.config.cache_key_tag
    for _ in range(2):
        activate_flash_attention_impl("clinattn")
        assert current_flash_attention_impl() == "clinattn" and is_ours()
        assert torch.compiler.config.cache_key_tag != tag
        restore_flash_attention_impl()
        assert current_flash_attention_impl() is None and not is_ours()
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert torch.compiler.config.cache_key_tag == tag


def test_activating_twice_is_undone_once():
    sdpa.register()
    fast = torch.backends.mha.get_fastpath_enabled()
    activate_flash_attention_impl("clinattn")
    activate_flash_attention_impl("clinattn")
    assert is_ours()
    restore_flash_attention_impl()
    assert not is_ours() and torch.backends.mha.get_fastpath_enabled() == fast


def test_activated_reaches_every_caller():
    operator = torch.ops.aten.scaled_dot_product_attention
    with activated():
        assert is_ours(lambda *x: operator(*x, is_causal=True))
        assert in_another_thread(is_ours)


def in_another_thread(function):
    answer = []
    thread = threading.Thread(target=lambda: answer.append(function()))
    thread.start()
    thread.join()
    return answer[0]


def test_block_is_for_its_thread_and_may_be_nested():
    assert not is_ours()
    with sdpa.sdpa():
        assert is_ours() and not in_another_thread(is_ours)
        with sdpa.sdpa():
            assert is_ours()
        assert is_ours()
    assert not is_ours()
    with pytest.raises(KeyError), sdpa.sdpa():
        raise KeyError
    assert not is_ours()


def test_block_serves_torch_func():
    q, k, v = (x.detach() for x in qkv())
    per_sample = lambda f: torch.vmap(torch.func.grad(lambda q, k, v: f(q, k, v).sum()))(q, k, v)
    single = lambda f: lambda *x: f(*(y[None] for y in x))
    expected = per_sample(single(fused_attention))
    with sdpa.sdpa():
        assert torch.equal(per_sample(single(F.scaled_dot_product_attention)), expected)


def test_torch_func_is_torchs_where_activated():
    q, k, v = (x.detach() for x in qkv())
    gradient = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).sum())
    expected = gradient(q)
    with activated():
        assert torch.equal(gradient(q), expected)


@both_ways
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_multihead_attention(batch_first, training, way, monkeypatch):
    """Covers eval mode without gradients, where torch's fused path would bypass attention."""
    module = nn.MultiheadAttention(24, 2, batch_first=batch_first).train(training)
    layer = nn.TransformerEncoderLayer(24, 2, 32, 0.0, batch_first=batch_first).train(training)
    ours = copy.deepcopy(module), copy.deepcopy(layer)
    assert all(adapt(x).replaced for x in ours)
    x = torch.randn(3, 13, 24) if batch_first else torch.randn(13, 3, 24)
    hidden = torch.arange(13) >= torch.tensor([[13], [5], [1]])
    calls = lambda m, a: (
        m(x, x, x, hidden, need_weights=False)[0],
        a(x, src_key_padding_mask=hidden),
    )
    seen = []
    monkeypatch.setattr(sdpa, "multi_head_attention", spy(seen, sdpa.multi_head_attention))
    monkeypatch.setattr(sdpa, "fused_attention", spy(seen, sdpa.fused_attention))
    with torch.set_grad_enabled(training), way():
        actual = calls(module, layer)
    assert len(seen) == 2
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(actual, calls(*ours))


def spy(seen, function):
    def called(*args, **kwargs):
        seen.append(kwargs)
        return function(*args, **kwargs)

    return called


@both_ways
def test_attention_weights_are_torchs(way):
    module = nn.MultiheadAttention(24, 2, batch_first=True)
    x = torch.randn(3, 13, 24)
    expected = module(x, x, x)
    with way():
        assert all(map(torch.equal, module(x, x, x), expected))


@both_ways
def test_multihead_attention_with_a_large_head(way):
    module = nn.MultiheadAttention(300, 1, batch_first=True)
    x = torch.randn(3, 13, 300)
    expected = module(x, x, x, need_weights=False)[0]
    backends_module._select.cache_clear()
    backends_module._warn_once.cache_clear()
    with way(), pytest.warns(RuntimeWarning, match="it does not serve head_dim above 256"):
        torch.testing.assert_close(module(x, x, x, need_weights=False)[0], expected)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("way", [*WAYS.values(), nullcontext], ids=[*WAYS, "neither"])
def test_compiled_functions_change_sides(way):
    """Compiled before, within and after: each call gets the attention of its time."""
    inputs = qkv(nq=65, nk=65, dim=40)
    attention = lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    before = results(attention, inputs)
    direct = results(fused_attention, inputs, is_causal=True)
    assert not same(before, direct)
    for _ in range(2):
        assert same(results(compiled, inputs), before)
        with way():
            expected = before if way is nullcontext else direct
            assert same(results(compiled, inputs), expected)
    assert same(results(compiled, inputs), before)
    torch.compiler.reset()


@pytest.mark.unpoisoned
def test_block_inside_a_compiled_function():
    def attention(*x):
        with sdpa.sdpa():
            return F.scaled_dot_product_attention(*x)

    inputs = qkv()
    compiled = torch.compile(attention, backend="aot_eager")
    assert same(results(compiled, inputs), results(fused_attention, inputs))


@pytest.mark.unpoisoned
@both_ways
def test_multihead_attention_compiles(way):
    module = nn.MultiheadAttention(24, 2, batch_first=True)
    x = torch.randn(3, 13, 24)
    f = lambda x: module(x, x, x, need_weights=False)[0]
    with way():
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), f(x))
    torch.compiler.reset()


def test_torch_without_a_registry_is_told(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="has no registry of flash attention implementations"):
        sdpa.register()
