"""The Triton kernels in Triton's interpreter.

Tiles are small here: short sequences have full tiles, edge tiles and tiles that nothing sees.
"""

import dataclasses
import types
import warnings

import interpreter_bf16  # noqa: F401
import interpreter_patches
import numpy
import pytest
import torch
import triton
import triton.language as tl
from cases import CASES, FEATURES, Case
from extremes import EXTREMES, ExtremeProblem
from mixtures import check_part
from neighbours import KEYWORDS, check_bits
from support import Problem, assert_close, dtype_id
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import clinattn
from clinattn.backends.call import Arguments
from clinattn.kernels import backward, configs, forward, launch
from clinattn.kernels.score import first_masked_key
from clinattn.kernels.tiles import packed_tile

SMALL = {"forward": (32, 16), "dq": (32, 16), "dkdv": (32, 32)}
# 400 rows have every kind of tile; a thousand take the interpreter half a minute.
EXACT_CASES = [x for x in (*CASES, *FEATURES) if x.work < 1e7 and x.longest <= 400]
ROUNDED_CASES = [
    case
    for case in CASES
    if case.id
    in (
        "one-query dim1 dim24 dim128 gqa scale-negative causal-keys-longer window window-left-open "
        "lengths-causal lengths-gqa mask-bool-bhqk mask-float-bhqk mask-bool-b11k mask-float-b11k "
        "mask-left-padding-window strides-sliced strides-reversed cotangent-expanded logits-1e4 "
        "packed packed-cross-causal packed-window packed-tail packed-lse-only"
    ).split()
]


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Small tiles, but for a test that asks for `shipped_tiles`."""
    if "shipped_tiles" not in request.fixturenames:
        for module in (forward, backward):
            config = lambda table, *_: configs.TileConfig(*SMALL[table], 4, 1)
            monkeypatch.setattr(module, "tile_config", config)


@pytest.fixture
def shipped_tiles():
    """The tiles of the configuration tables."""


@pytest.fixture
def overflow_checks():
    """No sum or product of integers leaves its type."""
    with interpreter_patches.overflow_checks():
        yield


@pytest.fixture(autouse=True)
def no_arithmetic_warnings():
    """numpy warns of inf - inf in lanes that a tl.where then discards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_fp32_matches_truth(case):
    problem = Problem(case, torch.float32)
    problem.check(problem.run("triton"))


@pytest.mark.parametrize("case", [x for x in EXTREMES if x.n < 300], ids=str)
def test_fp32_extremes(case):
    ExtremeProblem(case, torch.float32).check("triton")


@pytest.mark.parametrize("case", [x for x in EXTREMES if x.n < 300], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_16_bit_extremes(case, dtype):
    ExtremeProblem(case, dtype).check("triton")


# Rows of large scores, and of others, behind everything that hides a pair from 16-bit types
LARGE = [
    Case("causal-gqa", heads=4, kv_heads=2, nq=70, causal=True),
    Case("window", batch=1, nq=70, window=(20, 5)),
    Case("prefix", batch=1, nq=70, window=(5, 0), global_prefix=20),
    Case("keys", batch=3, nq=40, mask="left:b11k", window=9),
    Case("pairs", batch=1, nq=40, mask="bool:11qk"),
    Case("lengths", nq=40, q_lengths=(40, 9), kv_lengths=(3, 40), causal=True),
    Case("packed", nq=(40, 0, 17), causal=True, tail=3),
    Case("dropout", batch=1, nq=40, dropout=0.2),
    Case("softcap", batch=1, nq=40, softcap=1e8),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_scores_behind_masks(case):
    """Held to plain fp32: scores in 16 bits would choose other keys."""
    problem = Problem(dataclasses.replace(case, logits=1e9), torch.bfloat16)
    problem.q[..., ::3, :] /= 2**30
    actual, naive = problem.run("triton"), problem.plain(torch.float32)
    for name, truth in problem.truth.items():
        assert_close(name, actual[name], truth, naive[name].to(actual[name].dtype))


def test_rows_that_another_forward_has_left(monkeypatch):
    """The launch after the Gluon forward, which marks them, writes these and no others."""
    n, right, i = 300, 0, torch.arange(300)
    left = (i % 7 == 3) & (i < 100)  # none in later tiles
    q, k, v = (torch.randn(1, 2, n, 128).half() for _ in range(3))
    q[:, :, left] *= 1000
    call = Arguments(q, k, v, window_right=right)
    expected = forward.attention_forward(call)
    others = torch.where(left[:, None], torch.nan, expected[0]), expected[1].clone()
    others[1][..., left] = torch.nan
    stand_in = types.SimpleNamespace(launch_forward=lambda problem: others)
    monkeypatch.setattr(forward, "gluon_module", lambda: stand_in)
    monkeypatch.setattr(forward, "gains_by_gluon", lambda problem: True)
    actual = forward.attention_forward(call)
    assert all(map(torch.equal, actual, expected))
    assert (expected[2] != 0).any() and not expected[2][..., ~left].any()


def test_a_long_sequence_among_short_ones_takes_few_copies_of_the_table():
    """Many sequences take no more copies of the table than one: tiles share copies by turns."""
    far, lengths = 200, [3] * 40 + [200] + [16] * 8
    q, k, v, do = torch.randn(4, sum(lengths), 1, 8)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    table = torch.randn(1, 2 * far + 1)

    def gradient(backend, dtype):
        leaf = table.to(dtype).requires_grad_()
        inputs = [x.to(dtype) for x in (q, k, v)]
        o = clinattn.fused_attention_varlen(
            *inputs, cu_seqlens, relative_bias=leaf, max_seqlen_q=max(lengths), backend=backend
        )
        return torch.autograd.grad(o, leaf, do.to(dtype))[0]

    truth, plain = (gradient("reference", x) for x in (torch.float64, torch.float32))
    with torch.profiler.profile(profile_memory=True) as profile:
        actual = gradient("triton", torch.float32)
    assert_close("drelative", actual, truth, plain)
    largest = max(x.cpu_memory_usage for x in profile.events())  # of the whole backward pass
    assert largest <= 16 * table.nbytes + 4 * q.nbytes


LONG_SUMS = Case("long-sums", batch=1, heads=8, kv_heads=1, nq=500, dim=8, causal=True)


@pytest.mark.parametrize("case", [LONG_SUMS], ids=str)
def test_fp32_sums_are_those_of_tiles(case, monkeypatch):
    """With products as a GPU has them: a chain of multiply-adds that begins at what is given."""

    def dot(self, a, b, start, *_):
        x, y, total = (z.data.astype(numpy.float64) for z in (a, b, start))
        for step in range(x.shape[-1]):
            total += x[..., step, None] * y[..., step, None, :]
            total = total.astype(numpy.float32).astype(numpy.float64)
        return TensorHandle(total.astype(numpy.float32), start.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    problem = Problem(case, torch.float32)
    problem.check(problem.run("triton"))


@pytest.mark.parametrize("case", ROUNDED_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_16_bit_matches_truth(case, dtype):
    problem = Problem(case, dtype)
    problem.check(problem.run("triton"))


SHIPPED_CASES = [
    Case("causal", batch=1, nq=300, dim=64, causal=True),
    Case("window", batch=1, nq=300, dim=128, window=(70, 20)),
    Case("packed", nq=(200, 0, 70), kv_heads=1, dim=40),
    Case("mask", batch=1, nq=150, dim=256, mask="float:qk"),
]


@pytest.mark.parametrize("case", SHIPPED_CASES, ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_shipped_tiles(case, capability, shipped_tiles, overflow_checks, monkeypatch):
    monkeypatch.setattr(launch, "device_capability", lambda _: capability)
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(case, dtype)
        problem.check(problem.run("triton"))


@pytest.mark.parametrize("part", range(24))
def test_any_mixture_matches_truth(part, overflow_checks):
    check_part(["triton"], part, 3, [torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_bits_alone_padded_and_packed(keywords, dtype):
    check_bits("triton", KEYWORDS[keywords], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_edges_of_half_a_tile_depend_on_the_sequence_alone(dtype, monkeypatch):
    """Tiles of 32 keys have edges of 16, and what is an edge depends on the tile of queries."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "tile_config", lambda *_: configs.TileConfig(32, 32, 4, 1))
    check_bits("triton", KEYWORDS["causal"], dtype)


@triton.jit
def _locate(slots_ptr, found_ptr, cu_seqlens_ptr, num_seqs, total, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    sequence, start, rows, tile = packed_tile(
        tl.load(slots_ptr + pid), cu_seqlens_ptr, num_seqs, total, BLOCK
    )
    tl.store(found_ptr + 4 * pid, sequence)
    tl.store(found_ptr + 4 * pid + 1, start)
    tl.store(found_ptr + 4 * pid + 2, rows)
    tl.store(found_ptr + 4 * pid + 3, tile)


@pytest.mark.parametrize("num_seqs", [1, 127, 128, 300, 40_000])
def test_every_packed_tile_is_found_once(num_seqs):
    block, tail = 16, 21
    lengths = torch.randint(0, 40, (num_seqs,)) * (torch.rand(num_seqs) < 0.8)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    total = int(cu_seqlens[-1]) + tail
    slots = torch.arange(total // block + num_seqs + 1, dtype=torch.int32)
    if len(slots) > 1000:
        slots = slots[torch.randperm(len(slots))[:100].sort().values].contiguous()
    found = torch.empty(len(slots), 4, dtype=torch.int32)
    _locate[(len(slots),)](slots, found, cu_seqlens, num_seqs, total, block)
    sequence, start, rows, tile = found.long().T
    lengths = torch.cat([lengths, torch.tensor([tail])])
    assert torch.equal(rows, lengths[sequence])
    assert torch.equal(start, cu_seqlens.long()[sequence])
    assert torch.equal(slots, start // block + sequence + tile)
    live = tile * block < rows
    if len(slots) == total // block + num_seqs + 1:
        assert live.sum() == (-(-lengths // block)).sum()
        assert len(torch.stack([sequence, tile])[:, live].unique(dim=1).T) == live.sum()


WRONG_ENDS = [[0, 9999, 3, 40], [-5, 20, 30, 30], [50, 10, 0, -1]]


@pytest.mark.parametrize("cu_seqlens", WRONG_ENDS, ids=str)
def test_wrong_cu_seqlens_read_nothing_outside(cu_seqlens):
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    x = torch.randn(40, 1, 16)
    forward.attention_forward(Arguments(x, x, x, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens))


@triton.jit
def _first_masked(mask_ptr, found_ptr, begin, end, IS_BIAS: tl.constexpr):
    tl.store(found_ptr, first_masked_key(mask_ptr, 1, begin, end, IS_BIAS))


@pytest.mark.parametrize("at", [0, 5, 1023, 1024, 2500, None])
def test_first_masked_key(at):
    mask = torch.ones(3000, dtype=torch.bool)
    mask[2999] = False
    if at is not None:
        mask[at] = False
    found = torch.empty(1, dtype=torch.int32)
    for begin, end in ((0, 2990), (3, 2600)):
        expected = end if at is None or at < begin else at
        _first_masked[(1,)](mask, found, begin, end, False)
        assert found.item() == expected
        _first_masked[(1,)](torch.where(mask, 0.0, -1.0), found, begin, end, True)
        assert found.item() == expected


@pytest.mark.parametrize("dim", [16])
def test_offsets_beyond_32_bits(dim, overflow_checks):
    """Rows of k 2^31 elements apart, in memory that is reserved but never touched."""
    stride = 2**31 + 8
    k = torch.empty(stride + dim, dtype=torch.float16).as_strided((1, 1, 2, dim), (1, 1, stride, 1))
    k.copy_(torch.randn(k.shape))
    q, v = torch.randn(1, 1, 3, dim).half(), torch.randn(1, 1, 2, dim).half()
    o, *_ = forward.attention_forward(Arguments(q, k, v))
    expected = torch.softmax(q.float() @ k.float().mT, -1) @ v.float()
    torch.testing.assert_close(o.float(), expected, atol=2e-3, rtol=0)
