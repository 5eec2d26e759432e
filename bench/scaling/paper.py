"""A step of training on P processes on paper: bytes of gradients, what hides them, where it bends.

    python bench/scaling/paper.py            a table of 8 to 512 GPUs

Every process computes its share of a step's tokens. DDP then adds 4 bytes a weight up over all of
them by rings, which send 2 (P - 1) / P of that from each process. A bucket takes 2 (P - 1) messages
one after the other in a ring, 2 log2(P) in a tree, which NCCL takes where messages are small. All
but the last bucket may hide behind the backward pass of a process's last batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

BUCKET = 25 * 2**20  # bytes in a message of DDP
BACKWARD = 2 / 3  # of the products of a step


@dataclass(frozen=True)
class Machine:
    """A process, its links to others, and what several share.

    rate: FLOP/s of a process that has a processor to itself. processors: P beyond them share.

    within: bytes/s from a process to another of its node. between: from a node to another, by all
    its ports. node: processes of one. latency: seconds a message; tree: as NCCL sends small ones.
    overlap: the share of the backward pass that messages may hide in.
    memory: bytes/s, of which the optimiser needs 28 a weight.
    """

    rate: float
    within: float
    between: float
    node: int
    latency: float
    overlap: float
    memory: float
    processors: float = math.inf
    tree: bool = False


@dataclass(frozen=True)
class Job:
    """weights: of the model. flops: of a token, forward and backward. tokens: of a step, all of it.

    batch: tokens of a batch; a process takes as many batches as its share of the step has.
    """

    weights: float
    flops: float
    tokens: float
    batch: float


@dataclass(frozen=True)
class Step:
    """Seconds: of computing, of all messages, of those that nothing hides, of the optimiser."""

    compute: float
    messages: float
    exposed: float
    optimiser: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.optimiser


def step(job: Job, machine: Machine, processes: int) -> Step:
    """Returns the seconds of a step, whose tokens are shared out evenly over the processes."""
    own = job.tokens / processes
    share = min(1.0, machine.processors / processes)
    compute = own * job.flops / (machine.rate * share)
    total = 4 * job.weights
    messages = summed(total, machine, processes)
    last = summed(min(total, BUCKET), machine, processes)
    hiding = machine.overlap * BACKWARD * compute * min(1.0, job.batch / own)
    exposed = max(messages - hiding, last)
    return Step(compute, messages, exposed, 28 * job.weights / (machine.memory * share))


def summed(total: float, machine: Machine, processes: int) -> float:
    """Seconds to add `total` bytes up over the processes, bucket by bucket."""
    if processes == 1:
        return 0.0
    speed = machine.within
    if processes > machine.node:
        speed = min(speed, machine.between)
    rounds = 2 * (processes - 1)
    in_turn = 2 * math.ceil(math.log2(processes)) if machine.tree else rounds
    messages = math.ceil(total / BUCKET) * in_turn
    return rounds / processes * total / speed + messages * machine.latency


def efficiency(job: Job, machine: Machine, processes: int) -> float:
    """Tokens/s of a process on `processes` of them, over those of one alone with its own tokens.

    The tokens of a step grow with the processes (weak scaling).
    """
    grown = replace(job, tokens=job.tokens * processes)
    return step(job, machine, 1).seconds / step(grown, machine, processes).seconds


def bend(job: Job, machine: Machine, least: float = 0.9) -> int:
    """The most processes, a power of two, that still reach `least` of the tokens/s of one each.

    The tokens of a step stay what they are (strong scaling).
    """
    alone, processes = step(job, machine, 1).seconds, 1
    while alone / (2 * processes * step(job, machine, 2 * processes).seconds) >= least:
        processes *= 2
    return processes


# Nodes of eight H100: 989 TFLOP/s of bf16 on paper, of which encoders reach about 0.35; NVLink has
# 450 GB/s a direction and a port of 400 Gbit/s 50, of which rings reach 0.8 and 0.9
H100 = Machine(
    rate=0.35 * 989e12, within=360e9, between=8 * 45e9, node=8, latency=10e-6, overlap=0.9,
    memory=3.35e12, tree=True,
)  # fmt: skip
ONE_PORT = replace(H100, between=45e9)
# BERT base and a decoder of 1e9 weights: 6 FLOP a weight and token
BASE = Job(weights=110e6, flops=6 * 110e6, tokens=32_768, batch=32_768)
JOBS = {
    "110 M weights, batches of 32,768": BASE,
    "110 M weights, batches of 4,096": replace(BASE, tokens=4096, batch=4096),
    "1 B weights, batches of 16,384": Job(1e9, 6e9, 16_384, 16_384),
}
PORTS = {"a port a GPU": H100, "a port a node": ONE_PORT}
GPUS = (8, 16, 32, 64, 128, 256, 512)
STEP = 2**21  # tokens of a step that is shared out over more and more GPUs


def main() -> None:
    print(f"{'Share of the tokens/s of one GPU':<52}" + "".join(f"{p:>7}" for p in GPUS))
    for name, job in JOBS.items():
        for port, machine in PORTS.items():
            shares = "".join(f"{efficiency(job, machine, p):7.2f}" for p in GPUS)
            most = bend(replace(job, tokens=STEP), machine)
            print(f"{name}, {port:<18} {shares}   {STEP:,} tokens a step: up to {most} GPUs")


if __name__ == "__main__":
    main()
