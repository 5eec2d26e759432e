"""Unpacks the kernels and the extension of pack.py for the process that runs the stages.

Imports neither Triton nor clinattn before take() is called.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-pack"
ARCHIVE, VERSIONS = "triton.tar.xz", "versions.json"
EXTENSION = "libclinattn.so"  # for every Python and torch
HASHES = "hashes.json"  # in the archive: those of source and options by folder
EXTENSION_TAKEN = "CLINATTN_GPU_EXTENSION"  # set to 1: the stage build then compiles none


def take(folder: Path = FOLDER) -> dict[str, Any]:
    """Unpack a pack for this process and those that it starts; facts for a row of results.

    pack: "taken", "none" without a folder, or "refused: " and what differs. kernels: how many are
    in the cache, which lies beside the folder. changed: sources of kernels that are others than
    those packed, of which some compile anew. extension: "taken" for the compiled library, which is
    then in clinattn/. Called before clinattn is imported, and raises nothing.
    """
    folder = folder.resolve()
    if not (folder / VERSIONS).exists():
        return {"pack": "none"}
    try:
        packed = json.loads((folder / VERSIONS).read_text())
        here = versions()
        return take_kernels(folder, packed, here) | take_extension(folder)
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


def take_extension(folder: Path) -> dict[str, Any]:
    found = folder / EXTENSION
    if not found.exists():
        return {}
    copy = ROOT / "clinattn" / EXTENSION
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
    """Describes the names whose values differ between pack and machine; "" where none does."""
    return ", ".join(
        f"{name} {here[name]} here, {packed[name]} packed"
        for name in names
        if here[name] != packed[name]
    )


def compiler_key() -> str:
    """Returns the string with which this build of Triton begins the key of each kernel."""
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
