"""The CUDA kernels as nvcc compiles them, for cards that need not be here. No torch is compiled."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with triton, which is missing")

from building import cuda  # noqa: E402
from cuda_aot import CSRC, FRONT_ENDS, Kernel, known_cards, problems, words_of  # noqa: E402
from places import ROOT  # noqa: E402

from clinattn.tools.compiled.sass import count  # noqa: E402

if cuda.nvcc() is None:
    pytest.skip("nvcc is neither on PATH nor in CUDA_HOME", allow_module_level=True)

SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


@pytest.mark.parametrize("cards", FRONT_ENDS.values(), ids=lambda cards: f"sm{min(cards)}")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels(source, cards):
    known = tuple(card for card in cards if card in known_cards())
    if not known:
        pytest.skip(f"this nvcc compiles for none of {cards}")
    assert problems(source, known) == []


def test_verdicts_are_those_of_every_clone():
    assert str(ROOT) not in " ".join(words_of(SOURCES[0], FRONT_ENDS[80]))


TENSOR, FMA, EXP = "HMMA.16816.F32", "FFMA", "MUFU.EX2"
COPY = "LDGSTS.E.BYPASS.LTC128B.128"
GOOD = Kernel(
    name="dq",
    dtype="float16",
    variant=(64, False, False),
    card=80,
    registers=200,
    stack=0,
    shared=0,
    opcodes=frozenset({TENSOR, FMA, EXP, COPY}),
    loops=[count([TENSOR, FMA, EXP])],
)
BAD = {
    "16 bytes of stack": {"stack": 16},
    "0 bytes of stack": {"opcodes": GOOD.opcodes | {"LDL.LU"}},
    "static shared memory": {"shared": 1024},
    "no loop": {"loops": []},
    "no asynchronous copies": {"opcodes": GOOD.opcodes - {COPY}},
    "not the tensor-core products": {"opcodes": GOOD.opcodes - {TENSOR} | {"HMMA.1688.F32"}},
    "a loop without tensor-core products": {"loops": [*GOOD.loops, count([FMA, EXP])]},
    "products in other instructions": {
        "dtype": "float32",
        "opcodes": GOOD.opcodes - {TENSOR},
        "loops": [count([FMA] * 7 + [EXP])],
    },
    "never runs": {"variant": (64, False, True)},
}


@pytest.mark.parametrize("words, change", BAD.items(), ids=[x.replace(" ", "-") for x in BAD])
def test_what_is_wrong_is_found(words, change):
    assert not GOOD.problems()
    (found,) = replace(GOOD, **change).problems()
    assert words in found
