"""torch.nn.attention.varlen while clinattn is under torch's attention, against plain maths."""

import inspect

import pytest
import torch
from compared import Explicit, block_diagonal, gradients_of
from flash_inputs import DTYPES, TABLE, draw, packed, paged, sees
from sdpa_ways import activated, both_ways
from torch.nn.attention import varlen
from torch.nn.attention.varlen import AuxRequest

from clinattn.integrations.torch import sdpa

HAS = set(inspect.signature(varlen.varlen_attn).parameters)  # fewer in torch 2.11
LSE = {"return_aux": AuxRequest(lse=True)}
WINDOWS = {
    "full": {},
    "causal": {"window_size": (-1, 0)},
    "causal window": {"window_size": (4, 0)},
    "window": {"window_size": (3, 2)},
    "scale and splits": {"scale": 0.3, "num_splits": 1},
}


def varlen_attn(*args, enable_gqa=False, **words):
    """torch's function; 2.11 shares heads without the word."""
    if missing := words.keys() - HAS:
        pytest.skip(f"varlen_attn of torch {torch.__version__} has no {', '.join(missing)}")
    shared = {"enable_gqa": True} if enable_gqa and "enable_gqa" in HAS else {}
    return varlen.varlen_attn(*args, **shared, **words)


LENGTHS = {
    "same": ([5, 1, 12], [5, 1, 12]),
    "other": ([5, 7, 3], [9, 2, 3]),
    "empty": ([0, 5, 0, 4], [3, 0, 0, 6]),
}


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("words", WINDOWS.values(), ids=list(WINDOWS))
def test_varlen_attn(words, lengths, dtype, way):
    """Output, lse (H, Tq) and gradients with grouped heads; windows are bottom right."""
    (q, k, v), sequences = packed(*lengths, dtype=dtype)
    window = words.get("window_size", (-1, -1))
    blocks = [sees(n, m, window_size=window) for n, m in zip(*lengths, strict=True)]
    problem = Explicit(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        block_diagonal(blocks), scale=words.get("scale"),
    )  # fmt: skip
    with way():
        o, lse = varlen_attn(q, k, v, *sequences, enable_gqa=True, **words, **LSE)
    assert lse.shape == (4, len(q)) and lse.dtype == torch.float32
    do, dlse = problem.do[0].transpose(0, 1), problem.dlse[0]
    results = {"o": o, **gradients_of([o, lse], [do, dlse], q=q, k=k, v=v)}
    results = {name: x.transpose(0, 1)[None] for name, x in results.items()}
    problem.check({"lse": lse[None], **results})


@both_ways
@pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="torch 2.11 has no such op")
def test_result_is_written(way):
    (q, k, v), sequences = packed([5, 3], [4, 7])
    q, k, v = (x.detach() for x in (q, k, v))
    out = torch.full_like(q, float("nan"))
    words = {"enable_gqa": True, "window_size": (3, 0)}
    with way():
        expected = varlen_attn(q, k, v, *sequences, **words, **LSE)
        actual = varlen.varlen_attn_out(out, q, k, v, *sequences, **words, **LSE)
        with pytest.raises(ValueError, match="out: got torch.float32"):
            varlen.varlen_attn_out(out[:2], q, k, v, *sequences, **words)
    assert actual[0] is out and all(map(torch.equal, actual, expected))


@both_ways
@torch.no_grad()
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)], ids=str)
def test_used_keys_and_pages(window, way):
    """The first seqused_k keys of each sequence, packed or in pages; no others are read."""
    dense, lengths = [draw(2, 11, 2, 16, seed=at) for at in (1, 2)], [11, 6]
    q, ends_q = draw(7, 4, 16), torch.tensor([0, 3, 7], dtype=torch.int32)
    used = torch.tensor(lengths, dtype=torch.int32)
    parts = [torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in dense]
    ends_k = torch.tensor([0, 11, 17], dtype=torch.int32)
    words = {"enable_gqa": True, "window_size": window, **LSE}
    with way():
        expected = varlen_attn(q, *parts, ends_q, ends_k, 4, 11, **words)
        slots = [x.clone() for x in dense]
        for x in slots:
            x[1, 6:] = float("nan")
        places = torch.tensor([0, 11, 22], dtype=torch.int32)
        slots = [x.flatten(0, 1) for x in slots]
        actual = varlen_attn(q, *slots, ends_q, places, 4, 11, seqused_k=used, **words)
        assert all(map(torch.equal, actual, expected))
        pages = [paged(x, TABLE, 4) for x in dense]
        words |= {"seqused_k": used, "block_table": TABLE}
        for ends in (None, ends_k):
            actual = varlen_attn(q, *pages, ends_q, ends, 4, 11, **words)
            assert all(map(torch.equal, actual, expected))


Q, ENDS = draw(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
USED = torch.tensor([2, 4], dtype=torch.int32)
LEAF = draw(6, 2, 8).requires_grad_()
REFUSED = {
    "heads": ((Q, Q[:, :1], Q[:, :1], ENDS, ENDS), {}, ValueError, "enable_gqa=True"),
    "no keys": ((Q, Q, Q, ENDS, None), {}, ValueError, "cu_seq_k: got None"),
    "table alone": (
        (Q, Q[None], Q[None], ENDS, None), {"block_table": ENDS[None]}, ValueError, "seqused_k: g",
    ),
    "used": ((Q, Q, Q, ENDS, ENDS), {"seqused_k": USED + 1}, ValueError, "seqused_k"),
    "gradient": ((LEAF, Q, Q, ENDS, ENDS), {"seqused_k": USED}, RuntimeError, "for inference only"),
    "window": ((Q, Q, Q, ENDS, ENDS), {"window_size": (1,)}, TypeError, "window_size"),
    "longest": ((Q, Q, Q, ENDS, ENDS), {"max_q": 3}, ValueError, "max_seqlen_q: got 3"),
    "dtype": ((Q, Q.double(), Q, ENDS, ENDS), {}, TypeError, "expected one dtype"),
}  # fmt: skip


@both_ways
@pytest.mark.parametrize("inputs, words, error, match", REFUSED.values(), ids=list(REFUSED))
def test_bad_input_is_refused(inputs, words, error, match, way):
    words = {"max_q": 4, "max_k": 4} | words
    if "enable_gqa" in match and "enable_gqa" not in HAS:
        pytest.skip("torch 2.11 shares heads without the word")
    with way(), pytest.raises(error, match=match):
        varlen_attn(*inputs, **words)


@both_ways
@pytest.mark.unpoisoned
def test_varlen_attn_compiles(way):
    (q, k, v), (*ends, most_q, most_k) = packed([5, 3], [4, 7])
    words = {"window_size": (-1, 0)} | ({"enable_gqa": True} if "enable_gqa" in HAS else {})
    call = lambda q, k, v: varlen.varlen_attn(q, k, v, *ends, most_q, most_k, **words)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with way():
        results = [
            [o := f(q, k, v), *torch.autograd.grad(o.square().sum(), [q, k, v])]
            for f in (compiled, call)
        ]
    assert all(map(torch.equal, *results))
    torch.compiler.reset()


def test_torch_func_is_for_blocks():
    given = (Q, Q, ENDS, ENDS, 4, 4)
    gradient = torch.func.grad(lambda q: varlen_attn(q, *given).square().sum())
    with sdpa.sdpa():
        actual = gradient(Q)
        o = varlen_attn(LEAF, *given)
    (expected,) = torch.autograd.grad(o.square().sum(), [LEAF])
    assert torch.equal(actual, expected)
    with activated(), pytest.raises(NotImplementedError, match="a block"):
        gradient(Q)


@both_ways
def test_nothing_is_left_behind(way):
    """On a CPU torch has no such kernel: before and after, the call fails as it does."""
    call = lambda: varlen_attn(Q, Q, Q, ENDS, ENDS, 4, 4)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
            call()
        with way():
            call()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        call()
