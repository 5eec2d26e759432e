"""Packs the kernels and the extension that a GPU run needs, compiled, into one folder.

    python bench/gpu_pack.py --extension clinattn/_C.cpython-312-x86_64-linux-gnu.so
    python bench/gpu_pack.py --stages speed clinical    less of it
    python bench/gpu_pack.py --check                    whether the JIT finds what the pack has

Without a GPU, under the Python, the torch and the Triton of the machine that has one. Kernels stay
in build/gpu-kernels, so that a second run compiles what has changed. There, gpu.py calls take()
before anything else, and Triton then finds its kernels in a cache.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-pack"
CACHE = ROOT / "build" / "gpu-kernels"
ARCHIVE, VERSIONS = "triton.tar.xz", "versions.json"
HASHES = "hashes.json"  # in the archive: those of source and options by folder
EXTENSION_TAKEN = "CLINATTN_GPU_EXTENSION"  # set to 1: gpu.py then compiles none
KEPT = (".cubin", ".json", ".so")
LARGEST = 45 << 20  # bytes of a pack


# The side that takes


def take(folder: Path = FOLDER) -> dict[str, Any]:
    """Unpack a pack for this process and those that it starts; facts for a row of results.

    pack: "taken", "none" without a folder, or "refused: " and what differs. kernels: how many are
    in the cache, which lies beside the folder. changed: sources of kernels that are others than
    those packed, of which some compile anew. extension: "taken" for the compiled module, which is
    then in clinattn/, or "refused: ...". Called before clinattn is imported, and raises nothing.
    """
    folder = folder.resolve()
    if not (folder / VERSIONS).exists():
        return {"pack": "none"}
    try:
        packed = json.loads((folder / VERSIONS).read_text())
        here = versions()
        return take_kernels(folder, packed, here) | take_extension(folder, packed, here)
    except Exception as error:  # a run goes on and compiles
        return {"pack": f"refused: {error!r}"[:300]}


def take_kernels(folder: Path, packed: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    if differing := differences(packed, here, ("triton", "sm", "settings")):
        return {"pack": f"refused: {differing}"}
    # Another ptxas than Triton's own would be another compiler, with another key.
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        os.environ.pop(name, None)
    cache = folder.with_name(folder.name + "-unpacked")
    began = time.monotonic()
    unpack(folder / ARCHIVE, cache, packed["sm"])
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    other_build = differences(packed, here, ("triton_key",))
    names = packed["sources"].keys() | here["sources"].keys()
    changed = [x for x in sorted(names) if packed["sources"].get(x) != here["sources"].get(x)]
    return {
        "pack": "taken" + (f", of another build of Triton: {other_build}" if other_build else ""),
        "kernels": packed["kernels"],
        "changed": changed,
        "unpacked_s": round(time.monotonic() - began, 2),
    }


def take_extension(folder: Path, packed: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    found = next(folder.glob("_C.*.so"), None)
    if found is None:
        return {}
    if differing := differences(packed, here, ("python", "torch")):
        return {"extension": f"refused: {differing}"}
    copy = ROOT / "clinattn" / found.name
    copy.unlink(missing_ok=True)  # it may be a link, or loaded
    shutil.copy(found, copy)
    os.environ[EXTENSION_TAKEN] = "1"
    return {"extension": "taken"}


def versions(sm: int | None = None) -> dict[str, Any]:
    """The versions that a pack depends on. sm: of the card that is present by default."""
    import torch
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    if sm is None:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        sm = 10 * capability[0] + capability[1]
    return {
        "triton_key": hashlib.sha256(compiler_key().encode()).hexdigest(),
        "triton": triton.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.split("+")[0],
        "sm": sm,
        "settings": dict(sorted(get_cache_invalidating_env_vars().items())),
        "sources": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted((ROOT / "kernels").glob("*.py"))
        },
    }


def differences(packed: dict[str, Any], here: dict[str, Any], names: tuple[str, ...]) -> str:
    """Words about those of the names whose values differ; empty where none does."""
    return ", ".join(
        f"{name} {here[name]} here, {packed[name]} packed"
        for name in names
        if here[name] != packed[name]
    )


def compiler_key() -> str:
    """What this build of Triton puts first in the key of each kernel."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        from triton.compiler.compiler import triton_key
    return triton_key()


class Hashed(NamedTuple):
    """A source or options of which the hash alone is known."""

    digest: str

    def hash(self) -> str:
        return self.digest


def folder_name(source: str, options: str, sm: int) -> str:
    """The folder of Triton's cache for a kernel, from the hashes of its source and options."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(GPUTarget("cuda", sm, 32))
    settings = get_cache_invalidating_env_vars()
    key = get_cache_key(Hashed(source), backend, Hashed(options), settings)
    digest = hashlib.sha256(key.encode()).digest()
    return base64.b32encode(digest).decode().rstrip("=")


def unpack(archive: Path, cache: Path, sm: int) -> None:
    """The archive as a cache of Triton, which knows the files of a kernel by their paths.

    Folders get the names that this build of Triton gives them: those of one version differ in the
    keys, and compile the same kernels.
    """
    shutil.rmtree(cache, ignore_errors=True)
    with tarfile.open(archive) as files:
        files.extractall(cache, filter="data")
    for packed, hashes in json.loads((cache / HASHES).read_text()).items():
        folder = (cache / packed).rename(cache / folder_name(*hashes, sm))
        files_of_kernel = list(folder.iterdir())
        (metadata,) = (path.name for path in files_of_kernel if path.suffix == ".json")
        paths = {path.name: str(path) for path in files_of_kernel}
        (folder / f"__grp__{metadata}").write_text(json.dumps({"child_paths": paths}))


# The side that packs


def main(argv: list[str]) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    import gpu_kernels

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extension", type=Path, help="the compiled module _C of that Python")
    stages = dict(choices=gpu_kernels.STAGES, default=gpu_kernels.USUAL, metavar="STAGE")
    parser.add_argument("--stages", nargs="+", help=", ".join(gpu_kernels.STAGES), **stages)
    parser.add_argument("--all", action="store_true", help="every stage")
    parser.add_argument("--processes", type=int, default=2)
    limit = "after which nothing more is compiled, and the pack has what is there"
    parser.add_argument("--seconds", type=float, default=math.inf, help=limit)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--cache", type=Path, default=CACHE, help="of Triton, kept between runs")
    parser.add_argument("--check", action="store_true", help="of a pack that is there")
    options = parser.parse_args(argv)
    options.folder, options.cache = options.folder.resolve(), options.cache.resolve()
    if options.all:
        options.stages = list(gpu_kernels.STAGES)
    if options.check:
        return check(options.folder, options.stages)
    return pack(options)


def pack(options: argparse.Namespace) -> int:
    import gpu_compile
    import gpu_kernels
    import torch

    torch.set_num_threads(1)  # processes that compile are forks
    os.environ["TRITON_CACHE_DIR"] = str(options.cache)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ["TRITON_LIBCUDA_PATH"] = str(gpu_compile.libcuda_stub(options.cache / "libcuda"))
    folders: dict[Path, None] = dict.fromkeys(gpu_compile.driver_utils())
    hashes: dict[str, tuple[str, str]] = {}
    failed, rows = 0, []
    until = time.monotonic() + options.seconds
    for stage in options.stages:
        kernels, errors = gpu_compile.recorded(gpu_kernels.calls(stage))
        for text in sorted({repr(error)[:200] for error in errors}):
            print(f"{stage}: a call raised {text}", file=sys.stderr)
        began, before, done = time.monotonic(), len(folders), 0
        for result in gpu_compile.compiled(kernels, options.processes, until):
            if result.folder is not None:
                done += 1
                hashes[result.folder.name] = result.hashes
                folders |= dict.fromkeys((result.folder, *result.launchers))
                seconds = time.monotonic() - began
                print(f"\r{stage}: {done} of {len(kernels)} kernels, {seconds:.0f} s  ",
                      end="", flush=True)  # fmt: skip
            elif result.error:
                failed += 1
                print(f"\n{stage}: {result.error}", file=sys.stderr)
        if kernels:
            print()
        size = sum(x.stat().st_size for f in list(folders)[before:] for x in wanted(f))
        rows.append({"stage": stage, "launched": len(kernels), "kernels": done, "bytes": size})
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_archive(options.folder / ARCHIVE, list(folders), hashes)
    if options.extension:
        if b"cuda_forward" not in options.extension.read_bytes():
            print(f"{options.extension} has no CUDA kernels", file=sys.stderr)
        shutil.copy(options.extension, options.folder)
    facts = versions(gpu_compile.CAPABILITY) | {"kernels": len(hashes), "stages": rows}
    (options.folder / VERSIONS).write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{len(hashes)} kernels, {size / (1 << 20):.1f} MiB in {options.folder}; {failed} failed")
    if size > LARGEST:
        print(f"more than {LARGEST >> 20} MiB: name fewer stages", file=sys.stderr)
    return 1 if failed or size > LARGEST else 0


def wanted(folder: Path) -> list[Path]:
    """Those files of a folder of Triton's cache that running it takes."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in KEPT and not path.name.startswith("__grp__")
    )


def write_archive(path: Path, folders: list[Path], hashes: dict[str, tuple[str, str]]) -> None:
    """All in one stream: kernels that resemble each other, side by side, take little."""
    files = [file for folder in folders for file in wanted(folder)]
    files.sort(key=lambda file: (file.suffix, file.name, file.stat().st_size))
    with tarfile.open(path, "w:xz", preset=6) as archive:
        contents = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
        for name, data in (contents | {HASHES: json.dumps(hashes).encode()}).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def check(folder: Path, stages: list[str]) -> int:
    """Have the JIT itself launch all calls, on a driver that stands in, from a pack unpacked."""
    import gpu_compile
    import gpu_kernels

    cache = folder.with_name(folder.name + "-checked")
    unpack(folder / ARCHIVE, cache, gpu_compile.CAPABILITY)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    missed = 0
    for stage in stages:
        errors = []
        with gpu_compile.stand_in(), gpu_compile.counted() as misses:
            for call in gpu_kernels.calls(stage):
                try:
                    call()
                except Exception as error:
                    errors.append(error)
        missed += len(misses) + len(errors)
        print(f"{stage}: {len(misses)} compilations, {len(errors)} calls failed", flush=True)
    shutil.rmtree(cache)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
