"""Every instruction set that this machine runs, forced in turn, on sizes that cross their tiles."""

import os
import subprocess
import sys

import pytest
import torch
from cases import DENSE, PACKED, Case
from instruction_sets import BUILT, MODULE, SETS
from support import Problem, dtype_id

from clinattn import fused_attention, fused_attention_varlen

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LESS = [torch.float32, torch.bfloat16]
LONG = [
    Case("long", nq=400, nk=350, dim=72, heads=2, kv_heads=1),
    Case("long-causal", batch=1, nq=600, dim=64, heads=4, kv_heads=2, causal=True),
    Case("long-window", batch=1, nq=600, dim=40, window=(100, 33)),
    Case("long-left", batch=2, nq=520, dim=32, mask="left:b11k"),
    Case("long-mask", batch=2, nq=300, nk=515, dim=24, mask="bool:b1qk"),
    Case("long-bias", batch=1, nq=300, nk=300, dim=24, mask="float:1hqk"),
    Case("long-128", batch=1, nq=400, dim=128, causal=True),
    Case("long-256", batch=1, heads=1, nq=300, dim=256),
    Case("long-packed", nq=(300, 1, 0, 500, 33), dim=64, heads=2, causal=True),
    Case("long-segments", batch=2, nq=1100, dim=24, segments=9),
    Case("long-times", nq=(700, 90), dim=40, times="float64", time_window=9.0, causal=True),
    Case("long-prefix", batch=1, nq=1300, dim=24, window=40, global_prefix=150),
    Case("long-prefix-left", batch=2, nq=700, dim=24, mask="left:b11k", window=20, global_prefix=3),
    Case("long-dropout", batch=1, heads=4, kv_heads=2, nq=600, dim=24, dropout=0.2, causal=True),
    Case("long-dropout-left", batch=2, nq=330, dim=24, mask="left:b11k", dropout=0.4),
    Case("long-biases", batch=1, nq=600, dim=24, alibi="h", relative=300, softcap=4.0, causal=True),
    Case("long-decay", nq=(600, 70), dim=24, times="float64", time_decay=True, alibi="bh"),
    Case("long-mask-grad", batch=2, heads=4, kv_heads=2, nq=280, mask="float:11qk", mask_grad=True),
    Case("long-mask-grad-keys", batch=2, nq=280, mask="float:b11k", mask_grad=True),
    Case("long-mask-grad-rows", batch=2, nq=280, mask="float:bhq1", mask_grad=True, softcap=2.0),
]

# Sequences that end at every place in a tile of queries and of keys
SHORT = [
    Case("short", nq=tuple(range(1, 70)), dim=24, heads=2, kv_heads=1),
    Case("short-causal", nq=tuple(range(1, 131, 7)), dim=40, causal=True),
    Case("short-window", nq=tuple(range(1, 131, 6)), dim=33, window=(9, 4)),
    Case("short-softcap", nq=tuple(range(1, 70, 3)), dim=17, softcap=3.0, alibi="h"),
    Case("short-dropout", nq=tuple(range(1, 70, 3)), dim=64, dropout=0.3),
    Case("short-lse", nq=tuple(range(1, 70, 3)), dim=24, cotangent="lse"),
]


pytestmark = BUILT


# The best set is what test_attention and test_varlen run.
below_the_best = pytest.mark.parametrize(
    "instruction_set",
    SETS[:-1] or [pytest.param(None, marks=pytest.mark.skip("one instruction set runs here"))],
    indirect=True,
)
# Sets below the best take fp16 as they take bf16.
sets_and_their_dtypes = pytest.mark.parametrize(
    ("instruction_set", "dtype"),
    [(name, dtype) for name in SETS[:-1] for dtype in LESS]
    + [(name, dtype) for name in SETS[-1:] or [None] for dtype in DTYPES],
    indirect=["instruction_set"],
    ids=lambda value: dtype_id(value) if isinstance(value, torch.dtype) else value,
)


def across_tiles():
    """(case, set, dtype): a long problem for each thing that one of the three may get wrong.

    Sets other than AMX take fp16 as they take another type, and all but AVX512-BF16 16-bit
    ones as fp32 once rows are widened.
    """
    for name in SETS or [None]:
        for case in SHORT:
            yield from ((case, name, x) for x in (DTYPES if name in SETS[-1:] else LESS))
        best = LESS if name in (*SETS[-1:], "avx512_bf16") else [torch.float32]
        for case in LONG:
            yield from ((case, name, x) for x in (DTYPES if name == "amx" else best))


@below_the_best
@pytest.mark.parametrize("dtype", LESS, ids=dtype_id)
@pytest.mark.parametrize("case", [c for c in (*DENSE, *PACKED) if c.work < 3e5], ids=str)
def test_matches_truth(case, dtype, instruction_set):
    problem = Problem(case, dtype)
    problem.check(problem.run("cpu"))


@pytest.mark.parametrize(
    ("case", "instruction_set", "dtype"),
    list(across_tiles()),
    indirect=["instruction_set"],
    ids=lambda x: dtype_id(x) if isinstance(x, torch.dtype) else str(x),
)
def test_across_tiles(case, dtype, instruction_set):
    problem = Problem(case, dtype)
    problem.check(problem.run("cpu"))


def evaluate(q, k, v, do, **keywords):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    call = fused_attention_varlen if "cu_seqlens_q" in keywords else fused_attention
    o, lse = call(q, k, v, enable_gqa=True, return_lse=True, backend="cpu", **keywords)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def draw(dtype, heads, kv_heads, n, dim):
    return [torch.randn(1, h, n, dim).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"window": (150, 40)}], ids=str)
def test_same_bits_over_threads(keywords, dtype, instruction_set, threads):
    """One head: threads share it tile by tile and take turns on dq."""
    inputs = draw(dtype, 1, 1, 900, 48)
    threads(1)
    expected = evaluate(*inputs, **keywords)
    for count in (2, 5):
        threads(count)
        for actual, x in zip(evaluate(*inputs, **keywords), expected, strict=True):
            assert torch.equal(actual, x)


@pytest.mark.parametrize("dtype", LESS, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 1, 600, 600), (1, 4, 600, 600), (1, 1, 600, 1)], ids=str)
def test_same_gradients_of_biases_over_threads(shape, dtype, instruction_set, threads):
    """Heads and sequences share a mask, tiles of keys a slope, a decay and a table of biases."""
    inputs = [torch.randn(2, h, 600, 24).to(dtype) for h in (4, 2, 2, 4)]
    added = [torch.randn(shape).to(dtype), *(torch.rand(4) for _ in range(2)), torch.randn(4, 101)]
    times = torch.rand(2, 600).cumsum(1)

    def gradients(count):
        threads(count)
        torch.manual_seed(0)
        q, k, v, mask, decay, slopes, relative = given = [
            x.detach().requires_grad_() for x in (*inputs[:3], *added)
        ]
        o = fused_attention(
            *(q, k, v, mask, 0.1),
            **{"is_causal": True, "enable_gqa": True, "softcap": 5.0, "global_prefix": 3},
            **{"times": times, "time_decay": decay, "alibi_slopes": slopes},
            **{"relative_bias": relative, "backend": "cpu"},
        )
        return [o.detach(), *torch.autograd.grad(o, given, inputs[3])]

    expected = gradients(1)
    for count in (2, 5):
        for actual, x in zip(gradients(count), expected, strict=True):
            assert torch.equal(actual, x)


SHAPED = {
    **{"window": 90, "global_prefix": 70, "softcap": 4.0},
    **{"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    **{"relative_bias": torch.linspace(-1, 1, 4 * 61).view(4, 61)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "keywords", [{}, {"is_causal": True}, SHAPED], ids=["plain", "causal", "shaped"]
)
def test_same_bits_packed_and_left_padded(keywords, dtype, instruction_set):
    lengths = (500, 260, 385)
    members = [draw(dtype, 4, 2, n, 40) for n in lengths]
    alone = [evaluate(*member, **keywords) for member in members]

    packed = [torch.cat([m[i][0] for m in members], 1).transpose(0, 1) for i in range(4)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    results = evaluate(*packed, cu_seqlens_q=cu_seqlens, **keywords)
    for i, x in enumerate(results):
        x = x if i == 1 else x.transpose(0, 1)
        for part, expected in zip(x.split(lengths, 1), alone, strict=True):
            assert torch.equal(part, expected[i][0])

    n = max(lengths) + 5
    pad = [n - length for length in lengths]
    padded = [
        torch.cat(
            [torch.nn.functional.pad(m[i], (0, 0, p, 0)) for m, p in zip(members, pad, strict=True)]
        )
        for i in range(4)
    ]
    mask = torch.arange(n) >= torch.tensor(pad)[:, None]
    results = evaluate(*padded, attn_mask=mask[:, None, None], **keywords)
    for b, (p, expected) in enumerate(zip(pad, alone, strict=True)):
        for x, y in zip(results, expected, strict=True):
            assert torch.equal(x[b, :, p:], y[0])


@sets_and_their_dtypes
@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"window": (9, 4)}], ids=str)
def test_same_bits_of_every_short_length(keywords, dtype, instruction_set):
    """Alone, among others, padded behind lengths and behind a mask of keys; NaN in the padding."""
    lengths = torch.arange(1, 131)
    members = [draw(dtype, 1, 1, n, 19) for n in lengths.tolist()]
    alone = [evaluate(*member, **keywords) for member in members]

    packed = [torch.cat([m[i][0, 0] for m in members])[:, None] for i in range(4)]
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    results = evaluate(*packed, cu_seqlens_q=cu_seqlens, **keywords)
    together = [x[0] if i == 1 else x[:, 0] for i, x in enumerate(results)]
    for i, x in enumerate(together):
        for part, expected in zip(x.split(lengths.tolist()), alone, strict=True):
            assert torch.equal(part, expected[i][0, 0])

    rows = torch.nn.utils.rnn.pad_sequence
    padded = [rows([m[i][0, 0] for m in members], True, torch.nan)[:, None] for i in range(4)]
    by_lengths = evaluate(*padded, kv_lengths=lengths, q_lengths=lengths, **keywords)
    there = torch.arange(130) < lengths[:, None]
    q, k, v, do = padded
    by_mask = evaluate(
        q.nan_to_num(), k, v, do.nan_to_num(), attn_mask=there[:, None, None, :], **keywords
    )
    for results in (by_lengths, by_mask):
        for b, expected in enumerate(alone):
            for x, y in zip(results, expected, strict=True):
                assert torch.equal(x[b, :, : b + 1], y[0])


@sets_and_their_dtypes
def test_same_bits_of_a_row_among_fewer(dtype, instruction_set):
    q, k, v, _ = draw(dtype, 1, 1, 70, 19)
    every = fused_attention(q, k, v, backend="cpu")
    for n in range(1, 71):
        assert torch.equal(fused_attention(q[:, :, :n], k, v, backend="cpu"), every[:, :, :n])


def test_torch_keeps_its_bits(instruction_set):
    """Tile registers are configured for a task and given back: torch multiplies as before."""
    a, b = torch.randn(2, 512, 512).bfloat16()
    q = torch.randn(1, 2, 300, 64).bfloat16()
    before = a @ b
    evaluate(q, q, q, q)
    assert torch.equal(a @ b, before)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="'mmx' is not usable here; usable: scalar"):
        MODULE.set_instruction_set("mmx")


@pytest.mark.parametrize("name", SETS)
def test_environment_variable(name):
    library = "emulated_sets" if "emulated_sets" in sys.modules else "torch"
    code = f"import {library}; import clinattn._C as c; print(c.instruction_set())"
    environment = {**os.environ, "CLINATTN_CPU_ISA": name}
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, env=environment, text=True).strip() == name
