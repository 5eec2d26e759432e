"""The CUDA kernels on CPU tensors: emulated.py says how. Small shapes, against fp64 mathematics."""

import subprocess
import sys

import pytest
import torch
from cases import CASES, FEATURES
from emulated import emulated_cuda, missing
from extremes import EXTREMES, ExtremeProblem
from mixtures import check_part
from neighbours import KEYWORDS, check_bits
from places import LIB
from support import Problem, dtype_id

if reason := missing():
    pytest.skip(f"the kernels cannot be built: {reason}", allow_module_level=True)

SMALL = [case for case in (*CASES, *FEATURES) if case.work < 2e6]
ROUNDED = (
    "one-query dim1 dim24 dim128 dim256 gqa scale-negative causal-keys-longer window "
    "lengths-causal lengths-gqa mask-bool-bhqk mask-float-bhqk mask-float-b11k "
    "mask-left-padding-window strides-sliced strides-reversed cotangent-expanded logits-1e4 packed "
    "packed-cross-causal packed-window packed-tail packed-lse-only segments decay alibi-packed "
    "relative softcap prefix-gqa-long dropout-packed everything everything-packed"
).split()
TURING = (
    "causal gqa lengths-window mask-float-bhqk logits-1e4 packed dropout mask-grad-qk everything"
).split()
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def emulator():
    with emulated_cuda():
        yield


def named(names):
    return [case for case in (*CASES, *FEATURES) if case.id in names]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fp32_matches_truth(case):
    problem = Problem(case, torch.float32)
    problem.check(problem.run("cuda"))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("case", named(ROUNDED), ids=str)
def test_16_bit_matches_truth(case, dtype):
    problem = Problem(case, dtype)
    problem.check(problem.run("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=dtype_id)
@pytest.mark.parametrize("case", [x for x in EXTREMES if x.n < 300], ids=str)
def test_extremes(case, dtype):
    ExtremeProblem(case, dtype).check("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=dtype_id)
@pytest.mark.parametrize("case", named(TURING), ids=str)
def test_turing_matches_truth(case, dtype, monkeypatch):
    monkeypatch.setenv("CLINATTN_EMULATED_CAPABILITY", "75")
    problem = Problem(case, dtype)
    problem.check(problem.run("cuda"))


@pytest.mark.parametrize("part", range(4))
def test_any_mixture_matches_truth(part):
    check_part(["cuda"], part, 5, [torch.float32, *SIXTEEN_BITS])


@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("case", named(TURING), ids=str)
def test_any_order_of_warps_gives_the_same_bits(case, capability, monkeypatch):
    """The order shows where a barrier is missing; the emulator takes others by its seed."""
    monkeypatch.setenv("CLINATTN_EMULATED_CAPABILITY", str(capability))
    for dtype in (torch.float32, torch.float16):
        results = []
        for seed in range(4):
            monkeypatch.setenv("CLINATTN_EMULATOR_SEED", str(seed))
            results.append(Problem(case, dtype).run("cuda"))
        for other in results[1:]:
            assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_bits_alone_padded_and_packed(keywords, dtype):
    check_bits("cuda", KEYWORDS[keywords], dtype)


# q, k and v in the middle of 16 MiB each that nobody may touch
GUARDED = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, sys.argv.pop(1))
import emulated
emulated.stand_in(emulated.build())
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, page, size = ctypes.c_void_p, mmap.PAGESIZE, 60 * 2 * 32 * 4
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
def guarded():
    begin = libc.mmap(None, ctypes.c_size_t(1 << 24), 0, flags, -1, ctypes.c_long(0))
    pages, middle = -(-size // page) * page, begin + (1 << 23)
    assert libc.mprotect(ctypes.c_void_p(middle), ctypes.c_size_t(pages), 3) == 0
    buffer = (ctypes.c_char * size).from_address(middle + pages - size)
    return torch.frombuffer(buffer, dtype=torch.float32).view(60, 2, 32)
q, k, v = guarded(), guarded(), guarded()
ends = torch.tensor([int(x) for x in sys.argv[1:]], dtype=torch.int32)
args = [q, k, v, None, ends, ends, *[None] * 10, 0.2, -1, -1, False, 60, 60, 0.0, 0, 0.0]
o, lse, low = torch.ops.clinattn.cuda_forward(*args)
torch.ops.clinattn.cuda_backward(o, None, o, lse, low, *args, 0)
for reduce in range(6):
    torch.ops.clinattn.cuda_summary(lse, low, None, o, *args, reduce, 3)
"""


@pytest.mark.parametrize("ends", [(0, 40, 20, 60), (0, 20, 900, 60), (0, -30, 10, 9000)], ids=str)
def test_wrong_cu_seqlens_read_no_other_memory(ends):
    """On a device nobody looks at them beforehand."""
    command = [sys.executable, "-c", GUARDED, str(LIB), *map(str, ends)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_no_query_or_no_key(scale):
    q, none = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 0, 8)
    for query, key in ((q, none), (none, q)):
        inputs = [x.detach().requires_grad_() for x in (query, key, key)]
        args = [*inputs, *[None] * 13, scale, -1, -1, False, 5, 5, 0.0, 0, 0.0]
        o, lse, low = torch.ops.clinattn.cuda_forward(*args)
        assert not o.any() and (lse == -float("inf")).all() and not low.any()
        grads = torch.ops.clinattn.cuda_backward(o, None, o, lse, low, *args, 0)
        assert [x.shape for x in grads[:3]] == [x.shape for x in inputs]
        assert not any(x.any() for x in grads[:3])
