"""Runs kernels/forward_gluon_kernel.py on the CPU: a thread for each of its warp groups.

Gluon has no interpreter. Here the kernel's own functions run with stand-ins for the names they use:
barriers with the phases and counts of the hardware, copies that arrive late and out of step, and
products that read their operands when they are issued and again when they are waited for, which
must agree. A schedule that hangs, that frees a tile too early or that reads one too soon fails.
"""

import functools
import random
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from triton.experimental.gluon import language

from clinattn.kernels import forward_gluon_kernel
from clinattn.kernels.parameters import Strides

PATIENCE = 5.0  # seconds of waiting that count as a hang


class Values(torch.Tensor):
    """A tensor in registers, whose layout nothing here depends on."""

    type = SimpleNamespace(layout=None)


class Barrier:
    """An mbarrier: a phase ends when `count` threads have arrived and all bytes have."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, count=1, expected=0):
        with self.changed:
            assert self.pending >= count, "more arrivals than a phase has"
            self.pending -= count
            self.bytes += expected
            self.end_phase()

    def received(self, number):
        with self.changed:
            self.bytes -= number
            self.end_phase()

    def end_phase(self):
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase += 1
            self.changed.notify_all()

    def wait(self, parity):
        """Returns as mbarrier.try_wait.parity: once the phase under way has the other parity."""
        with self.changed:
            until = time.monotonic() + PATIENCE
            while self.phase & 1 == parity & 1:
                assert time.monotonic() < until and not failures, "deadlock"
                self.changed.wait(0.1)
        pause()


class Memory:
    """Shared memory, or a view of it, as Gluon's descriptor."""

    def __init__(self, data):
        self.data = data
        self.shape = list(data.shape)
        self.dtype = data.dtype

    def index(self, i):
        assert 0 <= i < self.shape[0]
        return Memory(self.data[i])

    def permute(self, order):
        return Memory(self.data.permute(order))

    def reshape(self, shape):
        return Memory(self.data.view(shape))

    def load(self, layout):
        return values(self.data.clone())

    def store(self, x):
        self.data.copy_(x)


class Barriers(list):
    def index(self, i):
        return self[i]


class Descriptor:
    """A TensorDescriptor as a kernel gets it."""

    def __init__(self, host):
        self.base = host.base.as_strided(host.shape, host.strides)
        self.dtype, self.layout = host.base.dtype, host.layout
        size = torch.Size(host.block_shape).numel() * host.base.element_size()
        self.block_type = SimpleNamespace(shape=host.block_shape, nbytes=size)

    def tile(self, at):
        """The block at a position, with zeros outside the tensor."""
        tile = torch.zeros(self.block_type.shape, dtype=self.dtype)
        inside = [
            slice(max(first, 0), min(first + size, n))
            for first, size, n in zip(at, tile.shape, self.base.shape, strict=True)
        ]
        part = self.base[tuple(inside)]
        tile[tuple(slice(0, n) for n in part.shape)] = part
        return tile


class Pointer:
    def __init__(self, data, at=0):
        self.data, self.at = data, at

    def __add__(self, offset):
        return Pointer(self.data, self.at + offset)


class Product:
    """A product that is in flight: only its wait may touch the result."""

    def __init__(self, a, b, acc, use_acc):
        self.operands, self.acc, self.use_acc = (a, b), acc, use_acc
        self.seen = self.read()
        self.result = None

    def read(self):
        return [(x.data if isinstance(x, Memory) else x).float().clone() for x in self.operands]

    def finish(self):
        a, b = self.read()
        for now, then in zip((a, b), self.seen, strict=True):
            assert torch.equal(now, then), "an operand changed while the product was in flight"
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result = values(a @ b + acc if self.use_acc else a @ b)


class Machine(threading.local):
    """The program that a warp group runs, and its products in flight."""

    def __init__(self):
        self.program, self.programs, self.in_flight = 0, 1, []


machine = Machine()
copies, failures = [], []


def values(x):
    return x.as_subclass(Values)


def pause():
    time.sleep(random.choice((0, 0, 0, 1e-5, 1e-4)))


def copy(desc, at, barrier, memory):
    tile = desc.tile(at)

    def arrive():
        time.sleep(random.choice((0, 1e-4, 1e-3)))
        memory.data.fill_(float("nan"))  # half of a tile is no tile
        pause()
        memory.data.copy_(tile)
        barrier.received(desc.block_type.nbytes)

    copies.append(threading.Thread(target=arrive))
    copies[-1].start()


def multiply(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    product = Product(a, b, acc, use_acc)
    machine.in_flight.append(product)
    return product


def wait(outstanding, deps):
    pause()
    while len(machine.in_flight) > outstanding:
        machine.in_flight.pop(0).finish()
    (product,) = deps
    return product.result


def specialize(functions_and_args, num_warps, num_regs):
    place = machine.program, machine.programs
    failures.clear()

    def run(function, args):
        (machine.program, machine.programs), machine.in_flight = place, []
        try:
            function(*args)
            assert not machine.in_flight
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in functions_and_args]
    for thread in threads:
        thread.start()
    for thread in (*threads, *copies):
        thread.join()
    copies.clear()
    if failures:
        raise failures.pop(0)


def allocate(dtype, shape, layout):
    if dtype != torch.int64:
        return Memory(torch.full(shape, float("nan"), dtype=dtype))
    return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))


def store(pointer, x, mask):
    at, x, mask = torch.broadcast_tensors(pointer.at, x, mask)
    at, x = at[mask], x[mask]
    flat = pointer.data.view(-1)
    assert flat[at].isnan().all(), "written twice"
    flat[at] = x


def either(of_tensors, of_numbers):
    def function(*args):
        if not any(isinstance(x, torch.Tensor) for x in args):
            return of_numbers(*args)
        return of_tensors(*(x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in args))

    return function


def barrier_of(name):
    return lambda barrier, *args, **keywords: getattr(barrier, name)(*args, **keywords)


gl = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("float32", "int64", "exp2", "log2")},
    constexpr=None,
    program_id=lambda axis: machine.program,
    num_programs=lambda axis: machine.programs,
    where=either(torch.where, lambda condition, x, y: x if condition else y),
    cdiv=lambda a, b: int((a + b - 1) / b),  # towards 0, as on the device
    minimum=either(torch.minimum, min),
    maximum=either(torch.maximum, max),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    fma=lambda x, y, z: x * y + z,
    arange=lambda begin, end, layout: values(torch.arange(begin, end)),
    zeros=lambda shape, dtype, layout: values(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, x, dtype, layout: values(torch.full(shape, x, dtype=dtype)),
    convert_layout=lambda x, layout: x,
    cast=lambda x, dtype: x,
    store=store,
    static_range=range,
    static_assert=lambda x: None,
    allocate_shared_memory=allocate,
    warp_specialize=specialize,
    SliceLayout=lambda dim, parent: None,
    BlockedLayout=lambda *args: None,
    DotOperandLayout=lambda *args: None,
    NVMMADistributedLayout=lambda *args: None,
    NVMMASharedLayout=language.NVMMASharedLayout,
)
mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=barrier_of("init"),
    wait=barrier_of("wait"),
    arrive=barrier_of("arrive"),
    expect=lambda barrier, number: barrier.arrive(expected=number),
)


class Launcher:
    """Runs a kernel for every program of a grid, one after the other."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return functools.partial(self.run, grid)

    def run(self, grid, num_warps, enable_fp_fusion, **keywords):
        for name, x in keywords.items():
            if isinstance(x, torch.Tensor):
                keywords[name] = Pointer(x)
            elif hasattr(x, "block_shape"):
                keywords[name] = Descriptor(x)
            elif isinstance(x, Strides):
                keywords[name] = Strides(*(getattr(n, "value", n) for n in x))
        for program in range(grid[0]):
            machine.program, machine.programs = program, grid[0]
            self.kernel(**keywords)


@contextmanager
def emulated():
    """Makes attention_forward_gluon take tensors on the CPU and work as on the device."""
    module = forward_gluon_kernel
    functions = {name: x.fn for name, x in vars(module).items() if hasattr(x, "is_gluon")}
    functions["forward_kernel"] = Launcher(functions["forward_kernel"])
    stand_ins = dict(
        functions,
        gl=gl,
        LARGE=module.LARGE.value,
        mbarrier=mbarrier,
        load_tile=copy,
        fence_async_shared=lambda: None,
        warpgroup_mma=multiply,
        warpgroup_mma_wait=wait,
    )
    with mock.patch.multiple(module, **stand_ins):
        yield
