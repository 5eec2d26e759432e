"""The classes that are autograd Functions in flash-attn, and the other names of the hooks."""

import inspect

import pytest
import torch
from flash_inputs import TABLE, draw, packed, paged, qkv

from clinattn.integrations import flash_attn as fa
from clinattn.integrations.flash_attn import bert_padding, flash_attn_interface

SHARED = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
OPTIONS = (0.0, 0.3, True, (5, -1), 2.0, None, False)
ENDS = torch.tensor([0, 4, 18], dtype=torch.int32)
QKV = draw(2, 9, 3, 4, 16)
SPLIT = {
    "FlashAttnFunc": ("flash_attn_func", QKV.unbind(2), (), ()),
    "FlashAttnKVPackedFunc": ("flash_attn_kvpacked_func", (QKV[:, :, 0], QKV[:, :, 1:]), (), ()),
    "FlashAttnQKVPackedFunc": ("flash_attn_qkvpacked_func", (QKV,), (), ()),
}
FLAT = QKV.flatten(0, 1)
SPLIT |= {
    "FlashAttnVarlenFunc": (
        "flash_attn_varlen_func", FLAT.unbind(1), (ENDS, ENDS, 14, 14), (None,),
    ),
    "FlashAttnVarlenKVPackedFunc": (
        "flash_attn_varlen_kvpacked_func", (FLAT[:, 0], FLAT[:, 1:]), (ENDS, ENDS, 14, 14), (),
    ),
    "FlashAttnVarlenQKVPackedFunc": (
        "flash_attn_varlen_qkvpacked_func", (FLAT,), (ENDS, 14), (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_apply_is_the_function(name):
    """apply(tensors, sequences, the seven options, return_softmax, rest, is_grad_enabled)."""
    function, tensors, sequences, rest = SPLIT[name]
    apply, function = getattr(flash_attn_interface, name).apply, getattr(fa, function)
    results = []
    for call in (
        lambda *x: apply(*x, *sequences, *OPTIONS, True, *rest, True),
        lambda *x: function(*x, *sequences, *OPTIONS, True),
    ):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        o, lse, matrix = call(*leaves)
        results.append([o, lse, matrix, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(map(torch.equal, *results))
    words = list(inspect.signature(function).parameters)
    assert SHARED.split() == words[len(tensors) + len(sequences) :][:7]


@pytest.mark.parametrize("name", SPLIT)
def test_apply_without_gradients(name):
    _, tensors, sequences, rest = SPLIT[name]
    apply = getattr(flash_attn_interface, name).apply
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    args = (*leaves, *sequences, *OPTIONS, False, *rest)
    o = apply(*args, True)
    assert isinstance(o, torch.Tensor) and o.requires_grad
    assert not apply(*args, False).requires_grad
    with torch.no_grad():
        assert not apply(*args, True).requires_grad


@pytest.mark.unpoisoned
def test_apply_compiles():
    q, k, v = qkv(1, 7, 9, 2, 2, 16)
    apply = flash_attn_interface.FlashAttnFunc.apply
    call = lambda *x: apply(*x, *OPTIONS, False, True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))
    torch.compiler.reset()


def test_wrapped_hooks_are_the_hooks():
    hooks = [x for x in vars(flash_attn_interface) if x.startswith("_flash_attn_")]
    assert len(hooks) == 4
    for name in hooks:
        wrapped = getattr(flash_attn_interface, f"_wrapped{name}")
        assert wrapped is getattr(flash_attn_interface, name)


def test_gradients_that_are_not_wanted():
    q, k, v = (x.detach() for x in qkv(2, 7, 9, 4, 2, 16))
    options = (0.0, None, False, -1, -1, 0.0, None)
    out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, *options, False)
    do, grads = draw(*out.shape, seed=7), [torch.empty_like(x) for x in (q, k, v)]
    backward = flash_attn_interface._wrapped_flash_attn_backward
    rows = backward(do, q, k, v, out, lse, *grads, *options, True)
    some = torch.empty_like(k)
    again = backward(do, q, k, v, out, lse, None, some, None, *options, True)
    assert torch.equal(rows, again) and torch.equal(some, grads[1])


OFF = (0.0, None, True)


def test_part_of_the_keys():
    """leftpad_k and seqused_k: as if nothing else was there; NaN elsewhere is not read."""
    (q, k, v), (ends_q, ends_k, most_q, most_k) = packed([4, 0, 10], [6, 5, 12])
    q, k, v = (x.detach() for x in (q, k, v))
    first, last = (torch.tensor(x, dtype=torch.int32) for x in ([2, 0, 1], [6, 3, 1]))
    rows = torch.cat([torch.arange(2, 6), torch.arange(6, 9), torch.arange(0)])
    ends = torch.tensor([0, 4, 7, 7], dtype=torch.int32)
    forward = flash_attn_interface._flash_attn_varlen_forward
    expected = forward(q, k[rows], v[rows], ends_q, ends, most_q, 4, *OFF)
    hidden = torch.ones(len(k), dtype=torch.bool).index_fill_(0, rows, False)
    k, v = (x.masked_fill(hidden[:, None, None], float("nan")) for x in (k, v))
    words = {"leftpad_k": first, "seqused_k": last}
    actual = forward(q, k, v, ends_q, ends_k, most_q, most_k, *OFF, **words)
    assert all(map(torch.equal, actual, expected))
    words = {"seqused_k": torch.tensor([7, 5, 12], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"got \[0, 0, 0\] and \[7, 5, 12\], .* \[6, 5, 12\]"):
        forward(q, k, v, ends_q, ends_k, most_q, most_k, *OFF, **words)


def test_part_of_pages():
    dense_k, dense_v = draw(2, 11, 2, 16, seed=1), draw(2, 11, 2, 16, seed=2)
    q, used = draw(7, 4, 16), torch.tensor([11, 6], dtype=torch.int32)
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 7], [0, 11, 17]))
    pages = [paged(x, TABLE, 4) for x in (dense_k, dense_v)]
    forward = flash_attn_interface._flash_attn_varlen_forward
    words = {"block_table": TABLE, "num_splits": 1}
    expected = forward(q, *pages, ends_q, ends_k, 4, 11, *OFF, **words)
    whole = torch.tensor([0, 12, 24], dtype=torch.int32)
    actual = forward(q, *pages, ends_q, whole, 4, 12, *OFF, **words, seqused_k=used)
    assert all(map(torch.equal, actual, expected))
    with pytest.raises(ValueError, match="leftpad_k: got one with block_table"):
        forward(q, *pages, ends_q, ends_k, 4, 11, *OFF, **words, leftpad_k=used)


def test_splits_change_no_bit():
    q, k = draw(1, 3, 4, 16), draw(1, 70, 2, 16)
    results = [fa.flash_attn_with_kvcache(q, k, k, num_splits=n) for n in (0, 1, 7, 128, -1)]
    assert all(torch.equal(x, results[0]) for x in results[1:])


def test_residual_rows():
    """Rows, and all of them for the residual: gradients of both meet."""
    x, indices = draw(6, 2, 3).requires_grad_(), torch.tensor([4, 1])
    rows, residual = bert_padding.index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices]) and residual.data_ptr() == x.data_ptr()
    (grad,) = torch.autograd.grad([rows, residual], [x], [torch.ones(2, 2, 3), torch.ones(6, 2, 3)])
    assert grad[:, 0, 0].tolist() == [1, 2, 1, 1, 2, 1]


def test_padding_by_other_names():
    x, indices = draw(6, 2), torch.tensor([4, 1])
    for name, args in (
        ("IndexFirstAxis", (x, indices)),
        ("IndexPutFirstAxis", (x[:2], indices, 6)),
        ("IndexFirstAxisResidual", (x, indices)),
    ):
        snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")
        actual = getattr(bert_padding, name).apply(*args)
        torch.testing.assert_close(actual, getattr(bert_padding, snake)(*args), rtol=0, atol=0)
