"""Triton kernels compiled into Triton's cache for a card that need not be here.

    kernels = recorded(calls)      what the JIT would compile for these calls, which launch nothing
    results = compiled(kernels)    the folders of Triton's cache that then hold them

Calls run on CPU tensors through Triton's own JIT. Its driver is replaced by one that names the card
and launches nothing, so that the JIT hands the compiler the same source and options as on the card,
and the cache has them under the same key.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
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
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import make_backend
from triton.runtime import build, driver

from clinattn.backends import select
from clinattn.backends.triton import BACKEND
from gpu.unpacking import folder_name

CAPABILITY = 90
# Linkages that platform.architecture() reports, with the tool `file` at hand and without.
LINKAGES = ("ELF", "")


class Kernel(NamedTuple):
    """The arguments that the JIT hands to triton.compile."""

    source: Any
    options: dict[str, Any]


class Compiled(NamedTuple):
    """Folders of Triton's cache: of the kernel, and of the C code that launches it.

    folder: None after an error, and where no time was left. hashes: of the source and the options.
    """

    index: int
    folder: Path | None = None
    hashes: tuple[str, str] = ("", "")
    launchers: tuple[Path, ...] = ()
    error: str = ""


class StandIn:
    """A driver of Triton with the facts of a card, which loads and launches nothing."""

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
    """Within the block Triton's kernels take CPU tensors, and are those of this card."""
    before = driver._active
    driver.set_active(StandIn(capability))
    backend = select.register(BACKEND._replace(reasons_against=lambda device: []))
    try:
        yield
    finally:
        select.register(backend)
        driver._active = before


RECORDED: list[Kernel] = []


def record(source: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
    """Take the place of triton.compile: append to RECORDED, and return what launches nothing.

    Triton hashes a kernel in the order of first launches, and here as well: in 3.6 the hash of a
    function depends on whether the functions that it calls were hashed before, with other kernels.
    """
    source.hash()
    RECORDED.append(Kernel(source, dict(options)))
    return SimpleNamespace(
        function=None,
        packed_metadata=None,
        launch_metadata=lambda *args: None,
        run=lambda *args: None,
    )


def recorded(calls: Iterable[Callable[[], Any]]) -> tuple[list[Kernel], list[Exception]]:
    """(kernels that the JIT would compile for these calls, errors that calls raised).

    A kernel is returned by the first call of this process that launches it. The JIT keeps the
    recorder, so that nothing can be launched later in a process that has recorded.
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
    """Yields the names of the kernels that the block compiled, those from the cache left out."""
    missed: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            missed.append(src.name)

    with mock.patch.object(triton.knobs.compilation, "listener", listen):
        yield missed


KERNELS: list[Kernel] = []  # those of the processes that compile, which are forks


def compiled(kernels: list[Kernel], processes: int, until: float) -> Iterator[Compiled]:
    """Yields the result of each kernel as it ends; one that is in the cache takes milliseconds.

    until: the time.monotonic() after which only kernels in the cache have a folder.
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
    if not hasattr(nvidia, "make_launcher"):  # 3.9 has one launcher for all signatures
        return ()
    return modules(lambda: nvidia.CudaLauncher(source, metadata))


def driver_utils() -> tuple[Path, ...]:
    """Folders of the C code that this Triton compiles to load kernels."""
    return modules(lambda: nvidia.CudaUtils.__init__(mock.Mock()))


def modules(make: Callable[[], Any]) -> tuple[Path, ...]:
    """Folders of the C module that make() builds through triton.runtime.build, unloaded.

    The key of a folder holds platform.architecture(): there is a folder for each of LINKAGES.
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
    """The folder, with a libcuda.so.1 in it that launchers link with where no driver is.

    The library has all functions that Triton's sources name: a linker leaves out a library of which
    nothing is used, and what is linked then does not load beside the real one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        sources = Path(triton.__file__).parent / "backends" / "nvidia"
        texts = [path.read_text() for path in (*sources.glob("*.c"), *sources.glob("*.py"))]
        names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", " ".join(texts))))
        functions = "".join(f"void {name}(void) {{}}\n" for name in names)
        command = ["gcc", "-shared", "-fPIC", "-fno-builtin", "-x", "c", "-"]
        command += ["-Wl,-soname,libcuda.so.1", "-o", str(library)]
        subprocess.run(command, input=functions, text=True, check=True)
    return folder
