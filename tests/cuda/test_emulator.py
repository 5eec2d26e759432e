"""The words that CUDA kernels are written in, as the emulator says them (lib/csrc/emulator.h)."""

import os
import shlex
import shutil
import signal
import subprocess

import pytest
import torch
from places import ROOT

FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]
DTYPES = [torch.float16, torch.bfloat16]
ASCENDING, DESCENDING, *RANDOM = range(10)
NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16"}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the program with more flags; what comes back runs a kernel of it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not on PATH")

    def run_with(*flags):
        program = tmp_path_factory.mktemp("emulator") / "emulated_words"
        folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/lib/csrc'}"]
        source = ROOT / "tests/lib/csrc/emulated_words.cpp"
        command = [*compiler, *FLAGS, *flags, *folders, str(source), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr

        def run(name, *given, seed=ASCENDING, threads=1):
            settings = {"SEED": str(seed), "THREADS": str(threads)}
            environment = {f"CLINATTN_EMULATOR_{key}": value for key, value in settings.items()}
            return subprocess.run(
                [str(program), name],
                input=b"".join(x.numpy().tobytes() for x in given),
                capture_output=True,
                env={**os.environ, **environment},
            )

        return run

    return run_with


@pytest.fixture(scope="module")
def run(build):
    return build()


def numbers(done, dtype=torch.float32):
    assert done.returncode == 0, done.stderr.decode()
    return torch.frombuffer(bytearray(done.stdout), dtype=dtype)


def assert_aborts(done, *words):
    message = done.stderr.decode()
    assert done.returncode == -signal.SIGABRT, message
    for word in words:
        assert word in message


def as_floats(bits):
    return bits.to(torch.int32).view(torch.float32)


def with_ties(dtype):
    """Floats from all over, and those at and next to every number of dtype and every tie."""
    exact = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    exact = exact.view(torch.int32).long().sort().values
    ties = (exact[1:] + exact[:-1]) // 2
    near = torch.cat([exact, ties])
    everywhere = torch.arange(-(1 << 31), 1 << 31, 9973)
    return as_floats(torch.cat([near - 1, near, near + 1, everywhere]))


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a[~a.isnan()].view(torch.uint8), b[~b.isnan()].view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_numbers_are_rounded_as_by_torch(run, dtype):
    x = with_ties(dtype)
    assert same(numbers(run(f"round_{NAMES[dtype]}", x), dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_numbers_are_widened_as_by_torch(run, dtype):
    x = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    assert same(numbers(run(f"widen_{NAMES[dtype]}", x.view(torch.uint16))), x.float())


def assert_multiplies(run, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8)
    d = numbers(run(f"multiply_{NAMES[dtype]}", a.float(), b.float(), c)).view(16, 8)
    a, b, c = a.double(), b.double(), c.double()
    sizes = c.abs() + a.abs() @ b.abs()
    assert ((d - (c + a @ b)).abs() <= 17 * 2**-24 * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_multiply(run, dtype):
    assert_multiplies(run, dtype)


def test_matrices_are_loaded_as_ptx_says(run):
    def element(matrix, i, j):
        return 5 * (8 * matrix + i) % 32 * 8 + j

    plain, transposed = [], []
    for lane in range(32):
        i, j = lane // 4, lane % 4 * 2
        for matrix in range(4):
            plain += [element(matrix, i, j), element(matrix, i, j + 1)]
            transposed += [element(matrix, j, i), element(matrix, j + 1, i)]
    assert numbers(run("load"), torch.int16).tolist() == plain + transposed


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("seed", [ASCENDING, DESCENDING, *RANDOM[:2]])
def test_shuffles(run, seed, threads):
    expected = [
        [thread // 32 * 32 + lane for lane in ((thread + 3) % 32, thread % 32 ^ 9)]
        for thread in range(64)
    ]
    actual = numbers(run("exchange", seed=seed, threads=threads), torch.int32)
    assert actual.view(3, 64, 2).tolist() == 3 * [expected]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("hand_over", 5 * [*range(32), *range(96)]),
        ("hand_around", [0, *range(31)]),
    ],
)
def test_a_missing_barrier_shows(run, name, expected):
    def is_right(name, seed):
        return numbers(run(name, seed=seed)).tolist() == expected

    for seed in (ASCENDING, DESCENDING, *RANDOM):
        assert is_right(name, seed)
    assert is_right(f"{name}_unsynchronized", ASCENDING)  # by luck
    for seed in (DESCENDING, *RANDOM):
        assert not is_right(f"{name}_unsynchronized", seed)


@pytest.mark.parametrize(
    "name, missing",
    [("copy", 0), ("copy_one_left", 128), ("copy_two_left", 256), ("copy_uncommitted", 128)],
)
def test_copies_are_there_when_they_are_waited_for(run, name, missing):
    expected = torch.arange(1.0, 257)
    for lane in range(32):
        expected[4 * lane + lane % 5 : 4 * lane + 4] = 0
    expected[256 - missing :] = torch.nan
    torch.testing.assert_close(numbers(run(name)), expected, rtol=0, atol=0, equal_nan=True)


def test_exp2(run):
    x = torch.linspace(-126, 127, 32)
    x[:5] = torch.tensor([-torch.inf, torch.inf, torch.nan, -130, 0])  # 2^-130 is flushed to 0
    y = numbers(run("exp2", x))
    assert y[:2].tolist() == [0, torch.inf] and y[2].isnan() and y[3:5].tolist() == [0, 1]
    torch.testing.assert_close(y[5:], x[5:].double().exp2().float(), rtol=2**-22, atol=0)


def test_launch_refuses_what_cuda_does(run):
    # cudaErrorInvalidValue and cudaErrorInvalidConfiguration
    assert numbers(run("launch"), torch.int32).tolist() == [0, 1, 9, 9]


@pytest.mark.parametrize(
    "name, words",
    [
        ("diverge", ["divergence", "thread 0 is at shuffle_xor", "thread 16", "sync_warp"]),
        ("leave_warp", ["divergence", "thread 7 of its warp at return"]),
        ("leave_block", ["deadlock", "warp 0 waits in sync_block", "warp 1 has returned"]),
        ("write_after", ["wrote byte 100 of its 100 bytes"]),
        ("write_before", ["wrote byte -1 of its 100 bytes"]),
        ("load_outside", ["not 16 aligned bytes of shared memory"]),
        ("load_unaligned", ["not 16 aligned bytes of shared memory"]),
        ("copy_outside", ["not 16 aligned bytes of shared memory"]),
        ("copy_unaligned", ["copy_async takes up to 16 bytes"]),
    ],
)
def test_what_is_undefined_aborts(run, name, words):
    assert_aborts(run(name), "emulated_words.cpp" if "write" not in name else "", *words)


def test_turing(build):
    run = build("-O0", "-DCLINATTN_EMULATE_TURING")
    assert_multiplies(run, torch.float16)
    assert_aborts(run("copy"), "copy_async needs compute capability 8.0")
    nothing = torch.zeros(512)
    assert_aborts(run("multiply_bfloat16", nothing), "bfloat16 need compute capability 8.0")


def test_other_processors_switch_by_ucontext(build):
    run = build("-O0", "-DCLINATTN_EMULATE_UCONTEXT")
    assert numbers(run("hand_over", threads=2)).tolist() == 5 * [*range(32), *range(96)]
    assert_aborts(run("diverge"), "divergence")
