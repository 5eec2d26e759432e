"""The passes on their own, as ring attention calls them."""

import inspect

import pytest
import torch
from compared import Explicit, block_diagonal
from flash_inputs import draw, heads_first, packed, qkv, sees

from clinattn.integrations import flash_attn as fa
from clinattn.integrations.flash_attn import flash_attn_interface


def merge(out, lse, block_out, block_lse):
    """Two parts of the keys into one, as ring attention does."""
    block_out, block_lse = block_out.float(), block_lse.transpose(-2, -1).unsqueeze(-1)
    if out is None:
        return block_out, block_lse
    out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
    return out, lse - torch.nn.functional.logsigmoid(lse - block_lse)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_ring_of_two(causal):
    """The second rank's queries with its own keys, then the first rank's: as over all of them."""
    n = 9
    q, k, v = qkv(2, 2 * n, 2 * n, 4, 2, 24)
    problem = Explicit(*heads_first(q, k, v), sees(2 * n, 2 * n, causal))
    scale, off = 24**-0.5, (-1, -1, 0.0, None)
    ranks = [[x.detach()[:, r * n : (r + 1) * n] for x in (q, k, v)] for r in range(2)]
    outs, lses = [], []
    for rank in range(2):
        out = lse = None
        for step in range(2):
            source = (rank - step) % 2
            if causal and source > rank:
                continue
            _, kr, vr = ranks[source]
            block = flash_attn_interface._flash_attn_forward(
                ranks[rank][0], kr, vr, 0.0, scale, causal and step == 0, *off, False
            )
            out, lse = merge(out, lse, *block[:2])
        outs.append(out)
        lses.append(lse.squeeze(-1).transpose(1, 2))
    grads = [torch.zeros(2, 2 * n, h, 24) for h in (4, 2, 2)]
    dout = problem.do.transpose(1, 2)
    for rank in range(2):
        rows = slice(rank * n, (rank + 1) * n)
        for source in range(rank + 1 if causal else 2):
            qr, (_, kr, vr) = ranks[rank][0], ranks[source]
            blocks = [torch.full_like(x, float("nan")) for x in (qr, kr, vr)]
            flash_attn_interface._flash_attn_backward(
                dout[:, rows], qr, kr, vr, outs[rank], lses[rank], *blocks, 0.0, scale,
                causal and source == rank, *off, False,
            )  # fmt: skip
            at = slice(source * n, (source + 1) * n)
            for grad, block, where in zip(grads, blocks, (rows, at, at), strict=True):
                grad[:, where] += block
    problem.dlse.zero_()
    results = {"o": torch.cat(outs, 1), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    problem.check({name: x.transpose(1, 2) for name, x in results.items()})


def test_ring_hooks_varlen():
    """The keys of each sequence in two halves, merged; gradients from the lse of the whole."""
    lengths = [4, 0, 10]
    halves = [[(n + 1) // 2 for n in lengths], [n // 2 for n in lengths]]
    (q, k, v), (ends, _, most, _) = packed(lengths, lengths)
    blocks = [torch.ones(n, n, dtype=torch.bool) for n in lengths]
    problem = Explicit(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_diagonal(blocks))
    q, k, v = (x.detach() for x in (q, k, v))
    token = torch.cat([torch.arange(n) >= h for n, h in zip(lengths, halves[0], strict=True)])
    scale, out, lse, parts = 24**-0.5, None, None, []
    for part, half in enumerate(halves):
        at = (token == bool(part)).nonzero().squeeze(1)
        ends_k = torch.tensor([0, *half]).cumsum(0).int()
        sequences = (ends, ends_k, most, max(half))
        block = flash_attn_interface._flash_attn_varlen_forward(
            q, k[at], v[at], *sequences, 0.0, scale, False
        )
        out, lse = merge(out, lse, *block[:2])
        parts.append((at, sequences))
    dout, total = problem.do[0].transpose(0, 1), [torch.zeros_like(x) for x in (q, k, v)]
    for at, sequences in parts:
        grads = [torch.full_like(x, float("nan")) for x in (q, k[at], v[at])]
        flash_attn_interface._flash_attn_varlen_backward(
            dout, q, k[at], v[at], out, lse.squeeze(-1).transpose(0, 1), *grads, *sequences,
            0.0, scale, False, -1, -1, 0.0, None, False,
        )  # fmt: skip
        total[0] += grads[0]
        total[1][at], total[2][at] = grads[1:]
    problem.dlse.zero_()
    results = {"o": out, **dict(zip(("dq", "dk", "dv"), total, strict=True))}
    problem.check({name: x.transpose(0, 1)[None] for name, x in results.items()})


def test_hooks_with_dropout_are_the_function():
    """rng_state carries the pairs that were dropped into the backward pass."""
    q, k, v = qkv(2, 7, 9, 4, 2, 16)
    torch.manual_seed(5)
    o = fa.flash_attn_func(q, k, v, dropout_p=0.5, causal=True)
    do = draw(*o.shape, seed=7)
    expected = torch.autograd.grad(o, [q, k, v], do)
    torch.manual_seed(5)
    args, off = (0.5, 0.25, True, -1, -1, 0.0, None), (False,)
    out, lse, _, rng_state = flash_attn_interface._flash_attn_forward(q, k, v, *args, *off)
    assert torch.equal(out, o)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    flash_attn_interface._flash_attn_backward(
        do, q, k, v, out, lse, *grads, *args, True, rng_state=rng_state
    )
    torch.testing.assert_close(grads, list(expected))
    with pytest.raises(ValueError, match="rng_state"):
        flash_attn_interface._flash_attn_backward(do, q, k, v, out, lse, *grads, *args, True)


HOOKS = {
    "_flash_attn_forward": "q k v dropout_p softmax_scale causal window_size_left "
    "window_size_right softcap alibi_slopes return_softmax",
    "_flash_attn_backward": "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal "
    "window_size_left window_size_right softcap alibi_slopes deterministic rng_state",
    "_flash_attn_varlen_forward": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
    "return_softmax block_table leftpad_k seqused_k zero_tensors num_splits",
    "_flash_attn_varlen_backward": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k "
    "max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left window_size_right "
    "softcap alibi_slopes deterministic rng_state zero_tensors",
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_show_their_arguments(name):
    """Ring code builds its calls from getfullargspec, which does not look behind decorators."""
    hook = getattr(flash_attn_interface, name)
    assert inspect.isfunction(hook) and inspect.getfullargspec(hook).args == HOOKS[name].split()
