"""Compiles the C++ that includes torch, for CUDA too, against several releases of torch.

    python tests/lib/cuda_headers.py 2.11.0 2.14.1

A release comes as its wheel alone, without what it depends on; its headers are kept in
build/torch-headers/. The compiler checks the sources and makes no code. nvcc is asked for the
headers of CUDA. Exit code 1 where a file does not compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from building import cuda, flags, toolchain
from places import ROOT

KEPT = ROOT / "build" / "torch-headers"
# The wheels of this Python and system serve: headers are the same in all of them.
WHEEL = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
WHEEL += ["--platform", "manylinux_2_28_x86_64", "--no-deps", "--quiet"]


def headers(version: str) -> Path:
    """The include folder of this torch, downloaded once."""
    folder = KEPT / version
    done = folder / "complete"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        # Constraints of this machine are for installed packages; this wheel is not installed.
        free = os.environ | {"PIP_CONSTRAINT": os.devnull}
        command = [*pip, *WHEEL, "--dest", str(folder), f"torch=={version}"]
        subprocess.run(command, env=free, check=True)
        (wheel,) = folder.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [x for x in archive.namelist() if x.startswith("torch/include/")]
            archive.extractall(folder, names)
        wheel.unlink()
        done.touch()
    return folder / "torch" / "include"


def errors_of(source: Path, includes: list[Path], environment: dict[str, str]) -> str:
    """Returns the compiler's words on a file; empty where it compiles without a warning."""
    mine = [*flags.TORCH_COMMON_FLAGS, "-fsyntax-only", "-Wall", "-DUSE_CUDA"]
    mine += ["-DCLINATTN_HAVE_CUDA", "-DCLINATTN_CUDA_ARCHS=9.0"]
    mine += [word for path in includes for word in ("-isystem", str(path))]
    command = [*toolchain.compiler(), *mine, str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stderr.strip()


def check(version: str) -> bool:
    torch_headers = headers(version)
    used = cuda.nvcc_says("--dryrun", "-x", "cu", os.devnull)
    includes = [torch_headers]
    includes += map(Path, dict.fromkeys(re.findall(r'"-I([^"]+)"', used)))
    sources = sorted(x for x in (ROOT / "csrc").rglob("*.cpp") if not x.stem.startswith("isa_"))
    environment = dict(os.environ)  # a thread that reads it may meet a change of it
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = pool.map(lambda x: errors_of(x, includes, environment), sources)
        found = dict(zip(sources, errors, strict=True))
    failed = {source: text for source, text in found.items() if text}
    print(f"torch {version}: {len(sources) - len(failed)} of {len(sources)} files compile")
    for source, text in failed.items():
        print(f"{source.relative_to(ROOT)}\n{text}", file=sys.stderr)
    return not failed


if __name__ == "__main__":
    sys.exit(0 if all([check(version) for version in sys.argv[1:]]) else 1)
