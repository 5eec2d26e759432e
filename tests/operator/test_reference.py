"""The reference against torch's own attention, and what it promises about memory and work."""

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, dtype_id
from torch.utils._python_dispatch import TorchDispatchMode

from clinattn import fused_attention, fused_attention_varlen
from clinattn.backends.call import Arguments, Gradients, Incoming
from clinattn.backends.reference import attention as reference
from clinattn.backends.reference import blocks


def attend(q, k, v, *rest, window=(-1, -1), kv_end=None, q_lengths=None, mask=None):
    args = (mask, None, None, q_lengths, None, kv_end, *(None,) * 7, q.shape[-1] ** -0.5, *window)
    return Arguments(q, k, v, *args, False, q.shape[2], k.shape[2], 0.0, 0, 0.0)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"is_causal": True},
        {"scale": 0.2},
        {"attn_mask": torch.rand(33, 40) < 0.6},
        {"attn_mask": torch.randn(2, 1, 33, 40, dtype=torch.float64)},
        {"attn_mask": torch.rand(2, 1, 1, 40) < 0.6},
    ],
    ids=["plain", "causal", "scale", "bool", "bias", "keys"],
)
def test_is_torch_attention(keywords, heads, kv_heads):
    shapes = ((2, heads, 33, 24), (2, kv_heads, 40, 24), (2, kv_heads, 40, 24))
    qkv = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    ours = fused_attention(*qkv, enable_gqa=True, backend="reference", **keywords)
    theirs = F.scaled_dot_product_attention(*qkv, enable_gqa=True, **keywords)
    torch.testing.assert_close(ours, theirs)
    do = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, qkv, do), torch.autograd.grad(theirs, qkv, do)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_blocks_change_nothing_but_rounding(dtype, monkeypatch):
    q, k, v, do = (torch.randn(2, 2, 50, 8).to(dtype) for _ in range(4))
    lengths = torch.tensor([50, 21]).int()
    call = attend(q, k, v, window=(11, 4), q_lengths=lengths, kv_end=lengths)

    def everything():
        o, lse, low = reference.attention_forward(call)
        grads = reference.attention_backward(call, Incoming(do, None, o, lse, low), 0)
        more = (Gradients(k, v, q, *(None,) * 4), do, None, lse, low, 0)
        seconds = reference.attention_double_backward(call, *more)
        return o, lse, *grads, *seconds

    whole = everything()
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(blocks, "MIN_ROWS", 3)
    torch.testing.assert_close(everything(), whole)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_blocks_change_nothing_of_features(packed, monkeypatch):
    n = 50
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    qkv = [random(n, 4, 8) if packed else random(2, 4, n, 8) for _ in range(3)]
    times = random(n).sort()[0] if packed else random(2, n).sort(1)[0]
    cu_seqlens = torch.tensor([0, 50]).int()
    tensors = [*qkv, random(4), random(1 if packed else 2, 4), random(4, 9)]
    if not packed:
        tensors.append(random(2, 1, n, n))
    tensors = [x.requires_grad_() for x in tensors]

    def everything():
        torch.manual_seed(0)
        q, k, v, decay, slopes, relative, *mask = tensors
        words = dict(
            times=times, time_window=0.7, time_decay=decay, alibi_slopes=slopes, softcap=3.0,
            relative_bias=relative, global_prefix=5, dropout_p=0.2, return_lse=True,
            backend="reference",
        )  # fmt: skip
        if packed:
            o, lse = fused_attention_varlen(q, k, v, cu_seqlens, **words)
        else:
            o, lse = fused_attention(q, k, v, *mask, **words)
        grads = torch.autograd.grad(o.square().sum() + lse.sum(), tensors, create_graph=True)
        seconds = torch.autograd.grad(sum(x.square().sum() for x in grads), tensors)
        return o, lse, *grads, *seconds

    whole = everything()
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(blocks, "MIN_ROWS", 3)
    torch.testing.assert_close(everything(), whole)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and of all that `bmm` returns."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
            if function is torch.ops.aten.bmm.default:
                self.products += out.numel()
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_memory_is_linear(masked, monkeypatch):
    """No N x N buffer in any pass, and a mask of the keys is not spread out."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 18)
    n = 2048
    q, k, v, do = torch.randn(4, 1, 2, n, 4)
    mask = (torch.rand(1, 1, 1, n) < 0.5) if masked else None
    call = attend(q, k, v, mask=mask)
    with Largest() as seen:
        o, lse, low = reference.attention_forward(call)
        grads = reference.attention_backward(call, Incoming(do, None, o, lse, low), 0)[:3]
        more = (Gradients(*grads, *(None,) * 4), do, None, lse, low, 0)
        reference.attention_double_backward(call, *more)
    assert seen.elements <= blocks.BLOCK_ELEMENTS < n * n


def test_memory_of_features_is_linear(monkeypatch):
    """Nor is a table of distances, a slope or a decay spread out; gradients have their shapes."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 16)
    n = 2048
    tensors = [torch.randn(1, 1, n, 4), torch.rand(1), torch.rand(1, 1), torch.rand(1, 65)]
    q, decay, slopes, relative = (x.requires_grad_() for x in tensors)
    with Largest() as seen:
        o = fused_attention(
            q, q, q, times=torch.arange(n)[None], time_window=100, time_decay=decay,
            alibi_slopes=slopes, relative_bias=relative, softcap=3.0, global_prefix=2,
            backend="reference",
        )  # fmt: skip
        torch.autograd.grad(o.sum(), tensors)
    assert seen.elements <= 2 * blocks.BLOCK_ELEMENTS < n * n


def test_a_window_costs_its_width():
    n, window = 4096, 16
    q, k, v = torch.randn(3, 1, 1, n, 4)
    with Largest() as seen:
        reference.attention_forward(attend(q, k, v, window=(window, window)))
    assert seen.products < n * n / 3


def test_lengths_cost_their_squares():
    q, k, v = torch.randn(3, 2, 1, 512, 4)
    lengths = torch.tensor([512, 16]).int()
    with Largest() as seen:
        reference.attention_forward(attend(q, k, v, q_lengths=lengths, kv_end=lengths))
    assert seen.products == 512 * 512 + 16 * 16 + (512 + 16) * 4
