"""nvcc, the cards that it compiles for, and the CUDA kernels of an extension."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from build_support import ninja
from build_support.flags import NVCC_FLAGS, link_flags
from build_support.folders import LIBRARY
from build_support.sources import cuda_sources, torch_units, units

# The cards to compile for where neither TORCH_CUDA_ARCH_LIST nor a card names any.
CUDA_ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
OLDEST_CUDA_ARCH = (7, 5)
CPU_BUILD = "is built without CUDA"


def nvcc() -> str | None:
    """The CUDA compiler, of CUDA_HOME or on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None
    return inside or shutil.which("nvcc")


def nvcc_says(*options: str) -> str:
    command = [nvcc() or "nvcc", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def cuda_missing() -> str | None:
    """Returns the reason why the CUDA kernels cannot be built here, or None."""
    if os.environ.get("CLINATTN_CUDA") == "0":
        return "CLINATTN_CUDA=0"
    try:
        import torch
    except Exception as error:  # a broken torch raises all kinds
        return f"torch cannot be imported ({error})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} {CPU_BUILD}; install a CUDA build of torch"
    if nvcc() is None:
        return (
            "nvcc is neither on PATH nor in CUDA_HOME; "
            f"install the CUDA toolkit {torch.version.cuda}, as of torch"
        )
    release = re.search(r"release (\d+)\.\d+", nvcc_says("--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "of unknown release"
        return f"nvcc is {found}, and torch is built with CUDA {torch.version.cuda}"
    if not cuda_archs():
        return "TORCH_CUDA_ARCH_LIST or the cards here are all older than compute capability 7.5"
    return None


def cuda_archs() -> list[str]:
    """Returns the cards to compile for: "8.0", or "9.0+PTX" to serve later cards, too.

    They are those of TORCH_CUDA_ARCH_LIST, in torch's notation, or else the cards of this machine.
    """
    import torch
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") in ("", "native"):
        if torch.cuda.device_count() == 0:
            known = nvcc_says("--list-gpu-arch")
            archs = [x for x in CUDA_ARCHS if f"compute_{x.replace('.', '')}\n" in known]
            return [*archs[:-1], f"{archs[-1]}+PTX"] if archs else []
    with_ptx: dict[tuple[int, int], bool] = {}
    for major, minor, kind in re.findall(
        r"compute_(\d+)(\d)a?,code=(sm|compute)", " ".join(_get_cuda_arch_flags())
    ):
        arch = int(major), int(minor)
        with_ptx[arch] = with_ptx.get(arch, False) or kind == "compute"
    usable = sorted(arch for arch in with_ptx if arch >= OLDEST_CUDA_ARCH)
    return [f"{major}.{minor}" + "+PTX" * with_ptx[major, minor] for major, minor in usable]


def gencode(arch: str) -> list[str]:
    """nvcc's flags for "8.0" or "9.0+PTX"."""
    number, _, ptx = arch.replace(".", "").partition("+")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    return flags + [f"-gencode=arch=compute_{number},code=compute_{number}"] * bool(ptx)


def wants_cuda() -> bool:
    """Returns whether to build the CUDA kernels; exits if they are forced but impossible."""
    asked = os.environ.get("CLINATTN_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"clinattn: CLINATTN_CUDA is {asked!r}; expected 0 or 1")
    reason = cuda_missing()
    if reason and asked == "1":
        sys.exit(f"clinattn: CLINATTN_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    if reason and CPU_BUILD not in reason:
        print(f"clinattn: building without the CUDA kernels: {reason}", file=sys.stderr)
    return reason is None


def cuda_parts(folder: Path) -> tuple[dict[str, ninja.Unit], ninja.Library]:
    """Compiles the CUDA kernels in a folder; returns the units of their torch side, and the link.

    The units replace those for CPU tensors of the same name.
    """
    archs = cuda_archs()
    flags = [*NVCC_FLAGS, *(flag for arch in archs for flag in gencode(arch))]
    kernels, torch_side = cuda_sources()
    named = {path.stem: ninja.Unit(path, flags) for path in kernels}
    title = f"for cuda {' '.join(archs)}"
    # Without ccache: 4.7 hashes the source as one card sees it, and gives an older object where
    # only what another card sees was changed.
    objects = ninja.build(title, [nvcc() or "nvcc"], named, folder)
    # The folders that nvcc itself uses; the folder above nvcc can be another.
    used = nvcc_says("--dryrun", "-x", "cu", os.devnull)
    more = [f"-isystem{x}" for x in dict.fromkeys(re.findall(r'"-I([^"]+)"', used))]
    more += ["-DUSE_CUDA", "-DCLINATTN_HAVE_CUDA", f"-DCLINATTN_CUDA_ARCHS={','.join(archs)}"]
    found = units()
    facts = found["facts"]
    link = [f"-L{x}" for x in dict.fromkeys(re.findall(r'"-L([^"]+)"', used))]
    return (
        {"facts": ninja.Unit(facts.source, [*facts.flags, *more]), **torch_units(torch_side, more)},
        ninja.Library(LIBRARY, objects, [*link_flags("torch_cuda"), *link, "-lcudart"]),
    )
