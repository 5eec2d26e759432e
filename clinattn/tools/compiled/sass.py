"""Counts instructions in the loops of a compiled kernel, as nvdisasm prints them."""

from __future__ import annotations

import re
from dataclasses import dataclass

LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)")
LABEL = re.compile(r"(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Tensor-core families of compute capability 8.x, 9.0 and 10.0; QGMMA and the like are for fp8.
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Loop:
    """Instructions of one warp in one turn: on tensor cores, ex2, fp32 multiply-adds, the rest.

    waits: how many of the rest wait for products of Hopper. barriers: how many hold a warp until
    all warps of the block are there. local: how many go to the stack.
    """

    tensor: int
    exp: int
    fma: int
    other: int
    waits: int
    barriers: int
    families: frozenset[str]
    local: int = 0

    def __add__(self, other: Loop) -> Loop:
        return Loop(
            self.tensor + other.tensor,
            self.exp + other.exp,
            self.fma + other.fma,
            self.other + other.other,
            self.waits + other.waits,
            self.barriers + other.barriers,
            self.families | other.families,
            self.local + other.local,
        )

    @property
    def instructions(self) -> int:
        return self.tensor + self.exp + self.fma + self.other

    @property
    def serialized(self) -> bool:
        """True where each Hopper product waits for the one before."""
        return 0 < self.tensor <= self.waits


def opcodes(sass: str) -> set[str]:
    """Opcodes that occur, with their suffixes."""
    return {found[1] for line in sass.splitlines() if (found := LINE.match(line))}


def loops(sass: str) -> list[Loop]:
    """The innermost loops with an exponential, which are those over tiles, in their order.

    ptxas puts the turns of a wait behind the code, and jumps back from there: that is no loop.
    """
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    conditional: set[int] = set()
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := LINE.match(line):
            if "@" in line or "UP" in found[2]:
                conditional.add(len(instructions))
            instructions.append((found[1], found[2]))
    ranges: list[tuple[int, int]] = []
    for at, (opcode, operands) in enumerate(instructions):
        target = TARGET.search(operands) if opcode.startswith("BRA") else None
        from_wait = at not in conditional and bool(ranges) and ranges[-1][1] == at
        if target and labels.get(target[1], at) < at and not from_wait:
            ranges.append((labels[target[1]], at + 1))
    counted = {span: count([opcode for opcode, _ in instructions[slice(*span)]]) for span in ranges}
    with_exp = [span for span in ranges if counted[span].exp]
    return [
        counted[begin, end]
        for begin, end in with_exp
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in with_exp)
    ]


def count(opcodes: list[str]) -> Loop:
    stems = [opcode.split(".")[0] for opcode in opcodes]
    tensor = sum(stem in TENSOR_CORE for stem in stems)
    exp = sum(opcode.startswith("MUFU.EX2") for opcode in opcodes)
    fma = sum(stem in ("FFMA", "FFMA2") for stem in stems)
    waits = sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes)
    barriers = sum(opcode.startswith("BAR.SYNC") for opcode in opcodes)
    families = frozenset(stem for stem in stems if stem in TENSOR_CORE)
    local = sum(stem in ("LDL", "STL") for stem in stems)
    other = len(opcodes) - tensor - exp - fma
    return Loop(tensor, exp, fma, other, waits, barriers, families, local)
