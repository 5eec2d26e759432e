"""Triton kernels compiled into Triton's cache for a card that need not be here.

    kernels = recorded(calls)      what the JIT would compile for these calls, which launch nothing
    results = compiled(kernels)    the folders of Triton's cache that then hold them

Calls run on CPU tensors through Triton's own JIT, whose driver is replaced: what it would hand to
the compiler is what it hands over on that card, so the key in the cache is the same.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
import triton.compiler
from gpu_pack import folder_name
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import make_backend
from triton.runtime import build, driver

CAPABILITY = 90
# What platform.architecture() says of the linkage, with the tool `file` at hand and without.
LINKAGES = ("ELF", "")


class Kernel(NamedTuple):
    """What the JIT hands to triton.compile."""

    source: Any
    options: dict[str, Any]


class Compiled(NamedTuple):
    """Folders of Triton's cache: of the kernel, and of what launches it.

    None without an error where there was no time. hashes: of source and options, which with those of the compiler name the folder.
    """

    index: int
    folder: Path | None = None
    hashes: tuple[str, str] = ("", "")
    launchers: tuple[Path, ...] = ()
    error: str = ""


class StandIn:
    """What the JIT asks of a driver, for a device that has the target's facts and runs nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        shared = {"max_shared_mem": 232_448, "max_num_regs": 65_536}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: shared,
            load_binary=lambda *args: (object(), object(), 0, 0, 1024),
            unload_module=lambda *args: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def stand_in(capability: int = CAPABILITY) -> Iterator[None]:
    """The JIT takes CPU tensors in the block as those of such a card."""
    backends = importlib.import_module("clinattn.backends")
    before = driver._active
    driver.set_active(StandIn(capability))
    try:
        with mock.patch.object(backends, "_reasons_against_triton", lambda device: []):
            yield
    finally:
        driver._active = before


RECORDED: list[Kernel] = []


def record(source: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
    """Note in place of triton.compile what the JIT asks for; the result launches nothing."""
    RECORDED.append(Kernel(source, dict(options)))
    return SimpleNamespace(
        function=None,
        packed_metadata=None,
        launch_metadata=lambda *args: None,
        run=lambda *args: None,
    )


def recorded(calls: Iterable[Callable[[], Any]]) -> tuple[list[Kernel], list[Exception]]:
    """What the JIT would compile, each kernel once in this process; and what calls raised.

    The JIT keeps the recorder for good: a process that records launches nothing later.
    """
    before, errors = len(RECORDED), []
    with stand_in(), mock.patch.object(triton.compiler, "compile", record):
        for call in calls:
            try:
                call()
            except Exception as error:
                errors.append(error)
    return RECORDED[before:], errors


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels that the block compiles, in place of taking them from the cache."""
    missed: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            missed.append(src.name)

    with mock.patch.object(triton.knobs.compilation, "listener", listen):
        yield missed


KERNELS: list[Kernel] = []  # those of the processes that compile, which are forks


def compiled(kernels: list[Kernel], processes: int, until: float) -> Iterator[Compiled]:
    """Of each kernel, as they end. Those that lie in the cache take no time.

    until: by time.monotonic(), after which no further one is compiled.
    """
    KERNELS[:] = kernels
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        work = functools.partial(compile_one, until)
        yield from pool.imap_unordered(work, range(len(kernels)))


def compile_one(until: float, index: int) -> Compiled:
    source, options = KERNELS[index]
    try:
        target = GPUTarget("cuda", CAPABILITY, 32)
        hashes = source.hash(), make_backend(target).parse_options(options).hash()
        folder = Path(triton.knobs.cache.dir) / folder_name(*hashes, CAPABILITY)
        group = folder / f"__grp__{source.name[:150]}.json"
        if time.monotonic() > until and not group.exists():
            return Compiled(index)
        result = triton.compile(source, target=target, options=options)
        assert group.exists(), "this Triton names its folders otherwise"
        return Compiled(index, folder, hashes, launchers(source, result.metadata))
    except Exception as error:
        words = " ".join(str(error).split())
        return Compiled(index, error=f"{source.name}: {type(error).__name__}: {words[-400:]}")


def launchers(source: Any, metadata: Any) -> tuple[Path, ...]:
    """Folders of the C code that this Triton compiles to launch a kernel of such a signature."""
    if not hasattr(nvidia, "make_launcher"):  # newer ones have one launcher for all
        return ()
    return modules(lambda: nvidia.CudaLauncher(source, metadata))


def driver_utils() -> tuple[Path, ...]:
    """Folders of the C code that this Triton compiles to load kernels."""
    return modules(lambda: nvidia.CudaUtils.__init__(mock.Mock()))


def modules(make: Callable[[], Any]) -> tuple[Path, ...]:
    """Folders of the module that make() compiles by triton.runtime.build and then would load.

    Its key holds what the machine says of itself: one folder for each thing that may be.
    """
    paths: list[Path] = []

    def load(name: str, path: str) -> Any:
        paths.append(Path(path))
        return mock.MagicMock()

    machine = build.platform_key().rsplit(",", 1)[0]
    compile_c = build._build
    for linkage in LINKAGES:
        again = (lambda *args, **kw: str(paths[0])) if paths else compile_c
        with (
            mock.patch.object(build, "_load_module_from_path", load),
            mock.patch.object(build, "platform_key", lambda: f"{machine},{linkage}"),  # noqa: B023
            mock.patch.object(build, "_build", again),
        ):
            make()
    return tuple(path.parent for path in paths)


def libcuda_stub(folder: Path) -> Path:
    """A folder with a libcuda.so.1 to link with: the name alone, for machines without a driver."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        command = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(library)], check=True)
    return folder


