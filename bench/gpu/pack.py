"""Packs the kernels and the extension that a GPU run needs, compiled, into one folder.

    python bench/gpu/pack.py --extension clinattn/libclinattn.so
    python bench/gpu/pack.py --stages speed clinical    less of it
    python bench/gpu/pack.py --check                    whether the JIT finds what the pack has

Without a GPU, under the Python, the torch and the Triton of the machine that has one. Kernels stay
in build/gpu-kernels, so that a second run compiles what has changed. On the other machine run.py
takes the pack (unpacking.py) before anything else, and Triton finds its kernels in a cache.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the package gpu
os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch

from gpu import ahead, launches
from gpu.unpacking import ARCHIVE, FOLDER, HASHES, ROOT, VERSIONS, unpack, versions

CACHE = ROOT / "build" / "gpu-kernels"
KEPT = (".cubin", ".json", ".so")
LARGEST = 45 << 20  # bytes of a pack


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extension", type=with_cuda, help="the compiled library libclinattn.so")
    stages = dict(choices=launches.STAGES, default=launches.USUAL, metavar="STAGE")
    parser.add_argument("--stages", nargs="+", help=", ".join(launches.STAGES), **stages)
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
        options.stages = list(launches.STAGES)
    if options.check:
        return check(options.folder, options.stages)
    return pack(options)


def with_cuda(name: str) -> Path:
    """Returns the path of a compiled library, which has to hold the CUDA kernels."""
    path = Path(name)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no {name}; docs/gpu.md says how to build it")
    if b"cuda_forward" not in path.read_bytes():
        raise argparse.ArgumentTypeError(f"{name} has no CUDA kernels; build it with nvcc")
    return path


def pack(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # processes that compile are forks
    os.environ["TRITON_CACHE_DIR"] = str(options.cache)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ["TRITON_LIBCUDA_PATH"] = str(ahead.libcuda_stub(options.cache / "libcuda"))
    folders: dict[Path, None] = dict.fromkeys(ahead.driver_utils())
    hashes: dict[str, tuple[str, str]] = {}
    failed, rows = 0, []
    until = time.monotonic() + options.seconds
    for stage in options.stages:
        kernels, errors = ahead.recorded(launches.calls(stage))
        for text in sorted({repr(error)[:200] for error in errors}):
            print(f"{stage}: a call raised {text}", file=sys.stderr)
        began, before, done = time.monotonic(), len(folders), 0
        for result in ahead.compiled(kernels, options.processes, until):
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
        shutil.copy(options.extension, options.folder)
    facts = versions(ahead.CAPABILITY) | {"kernels": len(hashes), "stages": rows}
    (options.folder / VERSIONS).write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{len(hashes)} kernels, {size / (1 << 20):.1f} MiB in {options.folder}; {failed} failed")
    if size > LARGEST:
        print(f"more than {LARGEST >> 20} MiB: name fewer stages", file=sys.stderr)
    return 1 if failed or size > LARGEST else 0


def wanted(folder: Path) -> list[Path]:
    """Returns the files in a folder of Triton's cache that are needed to run the kernel."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in KEPT and not path.name.startswith("__grp__")
    )


def write_archive(path: Path, folders: list[Path], hashes: dict[str, tuple[str, str]]) -> None:
    """Writes all folders into one compressed stream, similar kernels beside each other."""
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
    cache = folder.with_name(folder.name + "-checked")
    unpack(folder / ARCHIVE, cache, ahead.CAPABILITY)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    missed = 0
    for stage in stages:
        errors = []
        with ahead.stand_in(), ahead.counted() as misses:
            for call in launches.calls(stage):
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
