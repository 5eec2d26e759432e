"""Launches a forward pass through Triton's own launcher, on a libcuda that notes parameters.

    python tests/lib/real_launcher.py FOLDER

The library is built in FOLDER. A program of its own, because a process that has loaded the library
has a CUDA driver that launches nothing.
"""

import ctypes
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

# cuLaunchKernelEx copies the first `count` parameters, 8 bytes of each.
STUB = """
#include <string.h>
long long noted[256]; int count;
int cuPointerGetAttribute(long long *x, int attribute, long long p) { *x = p; return 0; }
int cuLaunchKernelEx(void *config, void *function, void **params, void **extra) {
  for (int i = 0; i < count; i++) memcpy(&noted[i], params[i], 8);
  return 0;
}
"""
OWN = {"cuPointerGetAttribute", "cuLaunchKernelEx"}
NO_SCRATCH = dict(
    num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
    profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False, tensordesc_meta=None,
)  # fmt: skip


def built_stub(folder):
    """Builds libcuda.so.1 with all functions that Triton's sources name; returns its path."""
    sources = Path(nvidia.__file__).parent
    texts = [path.read_text() for path in (*sources.glob("*.c"), *sources.glob("*.py"))]
    names = set(re.findall(r"\bcu[A-Z]\w+(?=\()", " ".join(texts))) - OWN
    code = STUB + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))
    path = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-fno-builtin", "-w", "-x", "c", "-"]
    subprocess.run(
        [*command, "-Wl,-soname,libcuda.so.1", "-o", str(path)], input=code, text=True, check=True
    )
    return path


def flat(signature, arguments):
    """Yields (type, argument) of what a kernel takes, constants left out."""
    for kind, x in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, x)
        elif kind != "constexpr":
            yield kind, x


class Driver:
    """NVIDIA's launcher with a card that need not be here."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self):
        self.utils = nvidia.CudaUtils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def allocate_default_profile_scratch(self, *sizes):
        return None


class Compiled:
    """Stands in for a compiled kernel; compares what reaches libcuda with what is launched."""

    def __init__(self, library, source):
        self.library, self.signature = library, tuple(source.signature.values())
        self.function, self.packed_metadata = 1, (4, 1, 0)
        self.launcher = nvidia.CudaLauncher(source, SimpleNamespace(**NO_SCRATCH))

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        given = list(flat(self.signature, args[9:]))
        ctypes.c_int.in_dll(self.library, "count").value = len(given)
        self.launcher(*args)
        noted = (ctypes.c_longlong * 256).in_dll(self.library, "noted")
        for (kind, x), word in zip(given, noted, strict=False):
            x = x.data_ptr() if isinstance(x, torch.Tensor) else getattr(x, "value", x)
            form = {"i32": "<ixxxx", "fp32": "<fxxxx"}.get(kind, "<q")
            (arrived,) = struct.unpack(form, struct.pack("<q", word))
            if kind == "fp32":
                (x,) = struct.unpack("<f", struct.pack("<f", x))
            assert arrived == x, (kind, arrived, x)
        print(len(given), "parameters arrived")


def main(folder):
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    library = ctypes.CDLL(str(built_stub(folder)), mode=ctypes.RTLD_GLOBAL)
    triton.compiler.compile = lambda source, **options: Compiled(library, source)
    driver.set_active(Driver())

    from clinattn.backends.call import Arguments
    from clinattn.kernels import forward, launch

    launch.device_capability = lambda device: (9, 0)
    q, k, v = (torch.zeros(1, 2, 20, 16, dtype=torch.bfloat16) for _ in range(3))
    call = Arguments(
        q, k, v, scale=0.25, slopes=torch.ones(1, 2), relative=torch.zeros(2, 5), softcap=3.0,
        seed=torch.zeros(1, dtype=torch.long), dropout_p=0.5, window_left=7,
    )  # fmt: skip
    for _ in range(2):  # by the JIT, and by a plan
        forward.attention_forward(call)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
