"""The exponentials of every instruction set, over all fp32 numbers (lib/csrc/exponential.cpp)."""

import shutil
import subprocess

import pytest
from building import flags, toolchain
from instruction_sets import SETS
from places import ROOT

# The last step rounds to half an ulp, the step before it adds up to a quarter; each adds as much
# again, at its own size, where products are rounded on their own.
FUSED, UNFUSED = 0.85, 1.1  # ulp
# 7.5e-5 of the polynomial and a few roundings; of the 16 bits of its result half a unit is 2e-3.
SHORT = 7.6e-5
# 7.5e-8 of the polynomial, half a unit of the last step and what earlier ones add
WEIGHT = 1.6e-7
LARGEST_ERROR = {
    "scalar": {"exp2": UNFUSED},
    "avx2": {"exp2": FUSED},
    "avx512": {"exp2": FUSED},
    "avx512_bf16": {"exp2": FUSED, "short": SHORT, "weight": WEIGHT},
    "amx": {"exp2": FUSED, "short": SHORT, "weight": WEIGHT},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the program as build_support builds the unit of an instruction set."""
    compiler = toolchain.compiler()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not on PATH")

    def run(name):
        if not toolchain.accepts(flags.ISA_FLAGS[name]):
            pytest.skip(f"{compiler[0]} does not know {name}")
        program = tmp_path_factory.mktemp(name) / "exponential"
        options = [*flags.isa_common_flags(), *flags.ISA_FLAGS[name], "-Wno-unused-function"]
        source = ROOT / "tests/lib/csrc/exponential.cpp"
        command = [*compiler, *options, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return program

    return run


@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_exponentials_are_right_everywhere(name, build):
    if name not in SETS:
        pytest.skip(f"{name} does not run here, or the compiled backend is not built")
    done = subprocess.run([build(name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = {word: float(error) for word, error in map(str.split, done.stdout.splitlines())}
    assert errors.keys() == LARGEST_ERROR[name].keys()
    for exponential, bound in LARGEST_ERROR[name].items():
        assert errors[exponential] <= bound, f"{exponential}: {errors[exponential]}"
