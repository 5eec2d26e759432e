"""Summaries of attention weights by the CUDA kernels on CPU tensors: emulated.py says how."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from cases import CASES, FEATURES, Case
from emulated import emulated_cuda, missing
from neighbours import KEYWORDS, LENGTHS
from places import LIB
from summaries import REDUCTIONS, SUMS, SummaryProblem
from summary_bits import RESULTS, check_bits, check_nan, check_unread, draw, every_summary
from support import dtype_id

from clinattn import attention_summary
from clinattn.operator import visibility

if reason := missing():
    pytest.skip(f"the kernels cannot be built: {reason}", allow_module_level=True)

SMALL = [case for case in (*CASES, *FEATURES) if case.work < 2e6 and case.dropout is None]
MOST = Case(
    "most", heads=4, kv_heads=2, nq=113, mask="float:1hqk", segments=4, times="float64",
    time_window=12.0, time_decay=True, alibi="bh", relative=9, softcap=5.0, global_prefix=3,
    window=(40, None), q_lengths=(113, 50), kv_lengths=(113, 50), value_dim=24,
)  # fmt: skip
ROUNDED = (
    "one-query dim1 dim24 dim128 dim256 gqa scale-negative scale-zero causal-keys-longer window "
    "lengths-causal lengths-gqa mask-bool-bhqk mask-float-bhqk mask-bool-b11k "
    "mask-left-padding-window strides-sliced strides-reversed strides-expanded logits-1e4 packed "
    "packed-empty-sequences packed-cross-causal packed-window packed-tail packed-dim128 "
    "values-narrower values-widest segments decay alibi-packed relative softcap prefix-gqa-long"
).split()
TURING = (
    "causal dim128 dim256 gqa lengths-window mask-bool-b11k mask-float-bhqk logits-1e4 packed "
    "values-widest"
).split()
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *SIXTEEN_BITS]
over_reductions = pytest.mark.parametrize("reduce", REDUCTIONS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@pytest.fixture(autouse=True, scope="module")
def emulator():
    with emulated_cuda():
        yield


def named(names):
    return [*(case for case in (*CASES, *FEATURES) if case.id in names), MOST]


def check(case, dtype):
    problem = SummaryProblem(case, dtype)
    for reduce in REDUCTIONS:
        problem.check(reduce, problem.summary(reduce, "cuda"))


@pytest.mark.parametrize("case", [*SMALL, MOST], ids=str)
def test_fp32_matches_the_matrix(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("case", named(ROUNDED), ids=str)
def test_16_bit_matches_the_matrix(case, dtype):
    check(case, dtype)


@over_dtypes
@pytest.mark.parametrize("case", named(TURING), ids=str)
def test_turing_matches_the_matrix(case, dtype, monkeypatch):
    monkeypatch.setenv("CLINATTN_EMULATED_CAPABILITY", "75")
    check(case, dtype)


@over_reductions
def test_of_a_given_normaliser(reduce):
    problem = SummaryProblem(Case("", nq=130, nk=70, heads=4, kv_heads=2, causal=True), DTYPES[0])
    problem.check(reduce, problem.summary(reduce, "cuda", problem.forward_lse("cuda")))


@over_dtypes
@pytest.mark.parametrize("size", [1, 3, 4, 13, 16])
def test_equal_weights_come_in_the_order_of_their_keys(size, dtype):
    q = torch.randn(1, 2, 40, 16).to(dtype)
    k = torch.randn(1, 2, 3, 16).to(dtype).repeat_interleave(50, 2)  # three weights, 50 keys each
    values, places = attention_summary(q, k, reduce="topk", k=size, backend="cuda")
    first = places[..., :1]
    assert torch.equal(places, first + torch.arange(size)) and (first % 50 == 0).all()
    assert (values == values[..., :1]).all()
    zeros = torch.zeros(1, 2, 40, 16).to(dtype)
    _, places = attention_summary(zeros, k, reduce="topk", k=size, is_causal=True, backend="cuda")
    seen = torch.arange(size) <= torch.arange(40)[:, None]
    assert torch.equal(places[0, 1], torch.where(seen, torch.arange(size), -1))


def test_weights_that_rise_and_fall_along_the_keys():
    """Each key of the one is among the largest so far, of the other none after the first."""
    q, k = (
        torch.ones(1, 1, 33, 8),
        torch.linspace(-2, 2, 300)[None, None, :, None].expand(-1, -1, -1, 8),
    )
    for keys, expected in ((k, torch.arange(299, 283, -1)), (k.flip(2), torch.arange(16))):
        values, places = attention_summary(q, keys, reduce="topk", k=16, backend="cuda")
        assert torch.equal(places, expected.expand(1, 1, 33, 16))
        p = (q @ keys.mT * 8**-0.5).softmax(-1)
        torch.testing.assert_close(values, p.gather(-1, places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_a_nan_of_a_query_reaches_what_sees_it(dtype):
    check_nan("cuda", dtype, 100)


def test_a_nan_of_a_key_reaches_what_sees_it():
    """Queries that see the key have no weights, and neither have the keys that they see."""
    q, k, v, do = torch.randn(4, 1, 1, 100, 16)
    k[..., 70, :] = v[..., 70, :] = torch.nan
    found = every_summary("cuda", q, k, v, do, torch.ones(100), window=5)
    away = (torch.arange(100) - 70).abs()
    for name, x in zip(RESULTS, found, strict=True):
        touched = away <= (10 if name in SUMS else 5)
        if name == "places":
            assert torch.equal((x[0, 0] == -1).all(-1), touched), name
        else:
            assert torch.equal(x[0, 0].isnan().reshape(100, -1).all(-1), touched), name
            assert x[0, 0, ~touched].isfinite().all(), name


def test_a_query_of_weight_0_is_not_read():
    check_unread("cuda", 100)


# Queries, also for do, of which a third, in the middle, lie in a page that nobody may read
UNREADABLE = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, sys.argv[1])
import emulated
emulated.stand_in(emulated.build())
page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
memory = mmap.mmap(-1, 3 * page)
q = torch.frombuffer(memory, dtype=torch.float32).view(1, 1, -1, 64)
n = q.shape[2]
assert libc.mprotect(ctypes.c_void_p(q.data_ptr() + page), ctypes.c_size_t(page), 0) == 0
k, weights = torch.randn(1, 1, n, 64), torch.ones(1, 1, n)
weights[..., n // 3 : 2 * n // 3] = 0
call = [q, k, k, *[None] * 13, 0.2, -1, -1, False, n, n, 0.0, 0, 0.0]
for reduce in range(3):
    torch.ops.clinattn.cuda_summary(torch.zeros(1, 1, n), None, weights, q, *call, reduce, 1)
"""


def test_memory_of_queries_of_weight_0_is_not_touched():
    command = [sys.executable, "-c", UNREADABLE, str(LIB)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reduce", SUMS)
def test_a_key_that_queries_of_weight_0_see_alone(reduce):
    q, k, v, do = torch.randn(4, 1, 2, 90, 16)
    k[..., 7, :] = torch.nan
    only = torch.zeros(90)
    only[80] = 1
    found = attention_summary(q, k, v, do, weights=only, reduce=reduce, window=4, backend="cuda")
    assert found.isfinite().all()


@over_dtypes
@pytest.mark.parametrize("keywords", KEYWORDS)
def test_fewer_of_the_largest_are_the_first_of_more(keywords, dtype):
    q, k = torch.randn(2, 1, 2, 70, 24).to(dtype)
    words = {**KEYWORDS[keywords], "reduce": "topk", "backend": "cuda"}
    most = attention_summary(q, k, k=16, **words)
    for size in range(1, 16):
        for fewer, more in zip(attention_summary(q, k, k=size, **words), most, strict=True):
            assert torch.equal(fewer, more[..., :size]), size


@over_dtypes
@pytest.mark.parametrize("words", [{}, {"alibi_slopes": torch.tensor([0.5, 2])}], ids=["", "alibi"])
@pytest.mark.parametrize("size", [1, 40], ids="logits-{}".format)
def test_by_key_and_by_query_weights_have_the_same_bits(size, words, dtype):
    """The sum of one query's weights is each of them; 16 keys are the largest 16."""
    q, k = size * torch.randn(1, 2, 20, 40).to(dtype), torch.randn(1, 2, 16, 40).to(dtype)
    values, _ = attention_summary(q, k, reduce="topk", k=16, backend="cuda", **words)
    for i in range(20):
        one = torch.nn.functional.one_hot(torch.tensor(i), 20).float()
        p = attention_summary(q, k, weights=one, backend="cuda", **words)
        assert torch.equal(p.sort(descending=True).values, values[:, :, i]), i


@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("case", named("causal gqa mask-float-bhqk packed".split()), ids=str)
def test_any_order_of_warps_gives_the_same_bits(case, capability, monkeypatch):
    """The order shows where a barrier is missing; the emulator takes others by its seed."""
    monkeypatch.setenv("CLINATTN_EMULATED_CAPABILITY", str(capability))
    for dtype in (torch.float32, torch.float16):
        problem, results = SummaryProblem(case, dtype), []
        for seed in range(3):
            monkeypatch.setenv("CLINATTN_EMULATOR_SEED", str(seed))
            results.append([x for reduce in REDUCTIONS for x in flat(problem, reduce)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def flat(problem, reduce):
    result = problem.summary(reduce, "cuda")
    return result if reduce == "topk" else [result]


@pytest.mark.parametrize("concrete", [True, False])
@pytest.mark.parametrize("keywords", KEYWORDS)
@over_dtypes
def test_bits_alone_padded_and_packed(dtype, keywords, concrete):
    """Also where a mask cannot be seen to be a range, as on a device."""
    members = draw(dtype, LENGTHS, heads=2, dim=24)
    alone = [every_summary("cuda", *member, **KEYWORDS[keywords]) for member in members]
    with mock.patch.object(visibility, "concrete", return_value=concrete):
        check_bits(members, alone, "cuda", **KEYWORDS[keywords])


@pytest.mark.parametrize("inputs, message", [
    ({"reduce": 6}, "reduce is 6"),
    ({"reduce": 1}, "do is missing"),
    ({"top": 17}, "top is 17"),
    ({"weights": torch.ones(1, 2, 4)}, "weights"),
    ({"dtype": torch.float64}, "double"),
])  # fmt: skip
def test_the_op_checks_its_arguments(inputs, message):
    q = torch.randn(1, 2, 5, 8, dtype=inputs.get("dtype", torch.float32))
    with pytest.raises(RuntimeError, match=message):
        op(q, q, **{name: x for name, x in inputs.items() if name != "dtype"})


@pytest.mark.parametrize("reduce", range(6))
def test_no_query_or_no_key(reduce):
    q, none = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 0, 8)
    for query, key in ((q, none), (none, q)):
        values, places = op(query, key, reduce=reduce, do=query)
        assert values.shape[:3] == (2, 2, (key if reduce < 3 else query).shape[2])
        assert not values.any() and (places == -1).all()


def op(q, k, reduce=0, top=3, weights=None, do=None):
    lse = q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    call = [q, k, k, *[None] * 13, 0.2, -1, -1, False, 5, 5, 0.0, 0, 0.0]
    return torch.ops.clinattn.cuda_summary(lse, None, weights, do, *call, reduce, top)
