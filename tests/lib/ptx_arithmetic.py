"""The expressions that the PTX of a forward kernel computes from two key tiles.

Two kernels with the same expressions give the same bits. Numbers are followed from one product to
the next along one path: each product once, masks where they cannot be jumped over. What a mask or
a guard selects for hidden pairs is left out, and so is what a zero or -inf does at the start.
"""

import re
from collections import deque

ZERO, MINUS_ZERO, ONE, NEG_INF = "0f00000000", "0f80000000", "0f3F800000", "0fFF800000"
STEPS = 8  # instructions of a product: 128 deep, 16 each
LN2 = "0f3F317218"


class Block:
    """Instructions without a branch among them; next: the blocks that can follow."""

    def __init__(self):
        self.code, self.next = [], []

    def has(self, words):
        return any(re.search(words, line) for line in self.code)


def blocks_of(ptx):
    """The blocks of a kernel, in the order of its text."""
    ptx = ptx[ptx.index(".entry") :]
    labels, blocks, jumps = {}, [Block()], []
    tables = re.findall(r"\.branchtargets\s+([^;]*);", ptx)
    for line in ptx.splitlines():
        line = line.strip()
        label = re.match(r"(\$L__BB\w+):", line)
        if label:
            blocks.append(Block())
            blocks[-2].next.append(blocks[-1])
            labels[label[1]] = blocks[-1]
        jump = re.match(r"(@!?%\w+ )?bra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if jump or re.match(r"(ret|exit|brx)", line):
            if jump:
                jumps.append((blocks[-1], jump[2]))
            if line.startswith("brx"):
                jumps += [(blocks[-1], x) for table in tables for x in re.split(r",\s*", table)]
            end = blocks[-1]
            blocks.append(Block())
            if jump and jump[1]:
                end.next.append(blocks[-1])
        elif not line.startswith((".loc", "//", "$L")):
            blocks[-1].code.append(line)
    for block, target in jumps:
        block.next.append(labels[target])
    return blocks


def path(start, goals):
    """The blocks after start up to the nearest goal; None if there is no way."""
    before, queue = {start: None}, deque([start])
    while queue:
        block = queue.popleft()
        if block in goals and block is not start:
            found = []
            while block is not start:
                found.append(block)
                block = before[block]
            return found[::-1]
        for after in block.next:
            if after not in before:
                before[after] = block
                queue.append(after)
    return None


QK = r"wgmma\.mma_async\S+n128k16\S+ *\{[^}]*\}, %rd"  # not of the narrow tiles of large scores
PV = r"wgmma\.mma_async\S+ *\{[^}]*\}, *\{"
RESULT = r"cvt\.rn\.(bf16x2|f16x2)"


class Arithmetic:
    """Numbers expressions: equal expressions have the same number."""

    def __init__(self):
        self.numbers, self.parts = {}, []

    def node(self, *parts):
        if parts not in self.numbers:
            self.numbers[parts] = len(self.parts)
            self.parts.append(parts)
        return self.numbers[parts]

    def results(self, ptx):
        """Returns sets of expressions of (o, lse), for each group of warps with its own code."""
        blocks = blocks_of(ptx)
        left = [x for x in blocks if x.has(QK)]
        found = []
        while left:
            self.registers, self.products = {}, [0, 0]
            block, visited, o, lse = blocks[0], [], [], []
            while goals := self.goals(blocks, left, visited, o, lse):
                way = path(block, goals[0]) or path(block, goals[1])
                assert way, "no way to the next product"
                for block in way:
                    visited.append(block)
                    more = self.perform(block)
                    if self.products == [2 * STEPS, 2 * STEPS]:
                        o, lse = o + more[0], lse + more[1]
                left = [x for x in left if x not in visited]
            found.append((set(o), set(lse)))
        return found

    def goals(self, blocks, left, visited, o, lse):
        """Returns the next goals, and others if those cannot be reached; None at the end."""
        products = [x for x in blocks if x.has(PV) and x not in visited]
        if self.products[1] < 2 * STEPS:
            return left, products
        wanted = RESULT if not o else LN2 if not lse else None
        return wanted and ([x for x in blocks if x.has(wanted) and x not in visited], [])

    def perform(self, block):
        """Performs a block; returns the numbers rounded to the type of o, and those times ln 2."""
        o, lse = [], []
        for line in block.code:
            product = re.match(r"wgmma\.mma_async\S+ *\{([^}]*)\}, (.*);", line)
            if product:
                self.multiply(product[1].split(","), product[2])
                continue
            match = re.match(r"(?:@!?%\w+ )?([a-z][\w.:]*)\s+(%\w+), (.*);", line)
            if match:
                operation, target, operands = match.groups()
                operands = operands.split(", ")
                value = self.value(operation, operands)
                self.registers[target] = value
                if re.match(RESULT, operation) and all(map(self.of_products, operands)):
                    o.append(value)
                if operation == "mul.rn.f32" and LN2 in operands:
                    lse.append(value)
        return o, lse

    def of_products(self, operand):
        """Returns whether a number is p v times another: a result, not p, which is rounded, too."""
        name, *factors = self.parts[self.get(operand)]
        return name == "mul" and any(self.parts[x][0] == "pv" for x in factors)

    def multiply(self, acc, operands):
        p = re.match(r"\{([^}]*)\}", operands)
        tile, step = divmod(self.products[p is not None], STEPS)
        self.products[p is not None] += 1
        if p is None:
            for i, register in enumerate(acc):
                self.registers[register] = self.node("s", str((tile, i)))
        else:
            p = [self.get(x) for x in p[1].split(",")]
            for i, register in enumerate(acc):
                self.registers[register] = self.node(
                    "pv", str((tile, step, i)), self.get(register), *p
                )

    def get(self, operand):
        if operand.startswith("0f"):
            return self.node(operand)
        return self.registers.get(operand, self.node("given"))

    def value(self, operation, operands):
        a = [self.get(x) for x in operands]
        zeros = self.node(ZERO), self.node(MINUS_ZERO)
        one, neg_inf = self.node(ONE), self.node(NEG_INF)
        name, _, kind = operation.partition(".")
        if operation in ("mov.b32", "mov.f32"):
            return a[0]
        if operation == "selp.f32":
            chosen = [x for x in a[:2] if x not in (*zeros, one, neg_inf)]
            return chosen[0] if len(chosen) == 1 else self.node("selp", *a[:2])
        if operation.startswith("shfl.sync.bfly"):
            return self.node("shfl", a[0], operands[1])
        if not kind.endswith(("f32", "f16x2.f32")):
            return self.node("given")
        if name == "neg":
            return self.node("neg", a[0])
        if name == "sub":
            name, a = "add", [a[0], self.node("neg", a[1])]
        if name == "fma" and "ftz" not in operation and one in a[:2]:
            name, a = "add", [a[0] if a[1] == one else a[1], a[2]]
        if name == "max" and neg_inf in a:
            return a[a[0] == neg_inf]
        if name == "add" and set(zeros) & set(a):
            return a[a[0] in zeros]
        if name == "mul" and set(zeros) & set(a):
            return zeros[0]
        if name in ("add", "mul", "max"):
            return self.node(name, *sorted(a))
        if name == "fma":
            return self.node(operation, *sorted(a[:2]), a[2])
        return self.node(operation, *a)
