"""Compiles a file of CUDA kernels for kinds of cards and says what is wrong with them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from building import cuda, flags
from kept import cache_folder, digest, kept
from places import ROOT

from clinattn.tools.compiled import sass
from clinattn.tools.compiled.kernel_report import triton_tool

CSRC = ROOT / "csrc"

# Cards by the architecture for which nvcc's front end compiles: from 8.0 on one program for all
FRONT_ENDS = {75: (75,), 80: (80, 86, 90, 100, 120)}
DTYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32"}
DIMS = (64, 128, 256)
VARIANTS = [(d, p, t) for d in DIMS for p in (False, True) for t in (False, True)]
# The gradients of added_kernel, by its last template argument
ADDED = ("mask", "near", "far")
# The results of summary kernels, by their last template argument
SUMMARIES = {"sum_by_key": ("received", "gradient"), "reduce_by_query": ("entropy", "top")}
SUMMARY_KERNELS = [name for names in SUMMARIES.values() for name in names]
FLAG = "Lb([01])E"
ENTRY = re.compile(
    rf"\d([a-z_]+)_kernelI({'|'.join(DTYPES)})"
    rf"(?:Li(\d+)E(?:{FLAG}LNS_13AddedGradientE(\d)E|{FLAG}{FLAG}(?:{FLAG}(?:{FLAG})?)?))?E"
)
NORMALISERS = "normalisers_kernel"  # one for all types


@dataclass(frozen=True)
class Kernel:
    """A kernel for one card. variant: head dim, whether pairs differ, whether for cards below 8.0;
    None where one serves all. stack: bytes of it and of spills. shared: bytes that are static.
    """

    name: str
    dtype: str
    variant: tuple[int, bool, bool] | None
    card: int
    registers: int
    stack: int
    shared: int
    opcodes: frozenset[str]
    loops: list[sass.Loop]

    def __str__(self):
        dim, pairs, _ = self.variant or ("any", False, False)
        return f"{self.name} {self.dtype} dim {dim}{' pairs' * pairs}"

    @property
    def is_used(self):
        return self.variant is None or self.variant[2] == (self.card < 80)

    def has(self, *prefixes):
        return any(opcode.startswith(prefixes) for opcode in self.opcodes)

    def problems(self):
        """Lists faults. The sources assert that dynamic shared memory alone fits the card."""
        if not self.is_used:
            return ["is not empty, and never runs"] if self.has("BAR") or self.loops else []
        found = []
        if self.stack or self.has("LDL", "STL"):
            found.append(f"{self.stack} bytes of stack and spills, {self.registers} registers")
        if self.registers > 255:
            found.append(f"{self.registers} registers")
        if self.shared:
            found.append(f"{self.shared} bytes of static shared memory, which nothing counts")
        if self.variant is None:
            return found
        if not self.loops:
            found.append("no loop over tiles")
        if self.card >= 80 and self.name not in ADDED and not self.has("LDGSTS"):
            found.append("no asynchronous copies")
        # Cards below 8.0 have no products of bf16.
        if self.dtype == "float32" or (self.dtype == "bfloat16" and self.card < 80):
            # The exponentials themselves take up to seven each; a product takes tens, in a loop
            # of its own that is unrolled twice. Gradients of what is added have fewer products, and
            # loops of their own around them; summaries have one or two.
            least = 0 if self.name in ADDED else 8 if self.name in SUMMARY_KERNELS else 16
            if self.has("HMMA") or any(loop.fma < least * loop.exp for loop in self.loops):
                found.append("products in other instructions than FFMA")
        elif not self.has("HMMA.1688." if self.card < 80 else "HMMA.16816."):
            found.append("not the tensor-core products of this card")
        elif not all(loop.tensor for loop in self.loops):
            found.append("a loop without tensor-core products")
        return found


def problems(source, cards):
    """Returns the faults of the kernels of a .cu file for cards, in words; kept in the cache.

    cards: some of one of FRONT_ENDS.
    """
    judges = (Path(__file__), Path(sass.__file__))
    key = digest(*sources(source), *judges, words=words_of(source, cards))
    name = "-".join(map(str, (source.stem, *cards)))
    return kept(cache_folder("cuda_aot"), name, key, lambda: compiled_and_judged(source, cards))


def words_of(source, cards):
    """Returns the file's name, nvcc's options and its version, without the path of this clone."""
    given = [x.replace(str(ROOT), "") for x in options(cards)]
    return [source.stem, *given, cuda.nvcc_says("--version")]


def options(cards):
    """nvcc's options for cards that share a front end, which then runs once for all of them."""
    front_end = next(x for x, those in FRONT_ENDS.items() if set(cards) <= set(those))
    codes = ",".join(f"sm_{card}" for card in cards)
    return [*flags.NVCC_FLAGS, "-Xptxas", "-v", f"-gencode=arch=compute_{front_end},code=[{codes}]"]


def compiled_and_judged(source, cards):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{source.stem}.o"
        command = [cuda.nvcc(), *options(cards), "-c", str(source), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return judged(source, path, said, cards)


def judged(source, path, said, cards):
    """Lists in words the faults of an object; said: what nvcc printed when it compiled it."""
    found = [x for x in said.splitlines() if "warning" in x.lower()]
    if " exit" in subprocess.run(["nm", "-u", path], capture_output=True, text=True).stdout:
        # what nvcc puts in the place of a function that is for the device alone
        found.append("the host calls a function of the device, which ends the process there")
    for card in cards:
        there = kernels(path, said, card)
        if expected(source.stem) != {(x.name, x.dtype, x.variant) for x in there}:
            found.append(f"sm_{card}: kernels are {', '.join(map(str, there))}")
        found += [f"sm_{card}: {x}: {words}" for x in there for words in x.problems()]
    return found


def expected(stem):
    """Returns (name, type, variant) of the kernels of a file."""
    if stem == "kernels":
        return {("normalisers", None, None), *(("prepare", x, None) for x in DTYPES.values())}
    name, dtype = stem.split("_")
    if name == "summary":
        return {(x, dtype, variant) for x in SUMMARY_KERNELS for variant in VARIANTS}
    if name == "added":
        return {(x, dtype, (d, True, t)) for x in ADDED for d in DIMS for t in (False, True)}
    names = {dim: ("dk", "dv") if name == "dkdv" and dim == 256 else (name,) for dim in DIMS}
    return {(name, dtype, x) for x in VARIANTS for name in names[x[0]]}


@cache
def known_cards():
    """Returns the cards that this nvcc compiles for."""
    known = cuda.nvcc_says("--list-gpu-code").split()
    return [card for cards in FRONT_ENDS.values() for card in cards if f"sm_{card}" in known]


def sources(path):
    """Returns a file and the files of this repository that it includes."""
    found, left = set(), [path.resolve()]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            named = re.findall(r'^\s*#include "(.+)"', path.read_text(), re.MULTILINE)
            places = [(folder / name).resolve() for name in named for folder in (path.parent, CSRC)]
            left += [place for place in places if place.exists()]
    return sorted(found)


def kernels(path, said, card):
    """Lists the kernels of an object for a card; said: what nvcc printed when it compiled it."""
    instructions = disassembled(path, card)
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        symbol, target = re.match(r"'(\w+)' for 'sm_(\d+)\w*'", part).groups()
        if int(target) != card:
            continue
        name, dtype, variant = entry(symbol)
        stack = sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill|cumulative)", part)))
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Kernel(
                name=name,
                dtype=dtype,
                variant=variant,
                card=card,
                registers=int(re.search(r"Used (\d+) registers", part)[1]),
                stack=stack,
                shared=int(shared[1]) if shared else 0,
                opcodes=frozenset(sass.opcodes(instructions[symbol])),
                loops=sass.loops(instructions[symbol]),
            )
        )
    return found


def entry(symbol):
    """Returns (name, type, variant) of a mangled kernel; dkdv for one gradient is dk or dv."""
    if NORMALISERS in symbol:
        return "normalisers", None, None
    name, dtype, dim, older, added, pairs, turing, dk, dv = ENTRY.search(symbol).groups()
    if added:
        return ADDED[int(added)], DTYPES[dtype], (int(dim), True, older == "1")
    if name in SUMMARIES:
        name = SUMMARIES[name][int(dk)]
    else:
        name = "dk" * (dk == "1") + "dv" * (dv == "1") or name
    return name, DTYPES[dtype], dim and (int(dim), pairs == "1", turing == "1")


def disassembled(path, card):
    """Returns {symbol: its instructions} of an object for a card."""
    with tempfile.TemporaryDirectory() as folder:
        extract = [triton_tool("cuobjdump"), "-xelf", f".sm_{card}.", path.resolve()]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        (cubin,) = Path(folder).iterdir()
        listing = [triton_tool("nvdisasm"), "-c", cubin]
        text = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\.section\s+\.text\.(\w+),", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
