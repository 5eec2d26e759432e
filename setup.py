"""Builds libclinattn.so, the compiled backend, which needs torch, a C++ compiler and ninja.

A build that cannot make it fails, and says what helps. CLINATTN_SKIP_EXT=1 asks for none: the slow
reference backend serves. The library also gets the CUDA kernels where torch is a CUDA build and
nvcc is found: CLINATTN_CUDA=0 leaves them out, CLINATTN_CUDA=1 makes their absence an error,
TORCH_CUDA_ARCH_LIST names their cards. CXX is the compiler, MAX_JOBS limits its processes,
CLINATTN_CCACHE=0 compiles without ccache, V=1 shows the commands. The rest is in build_support/.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# Off sys.path again at once: the folder kernels/ would shadow a package of that name.
sys.path.insert(0, str(ROOT))
from build_support.extension import extensions  # noqa: E402

sys.path.remove(str(ROOT))

# ninja may live in the virtual environment, which pip does not put on PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.chdir(ROOT)
setup(
    # kernels/ at the root is installed as clinattn.kernels and as nothing else: a top-level
    # module `kernels` would stand in the way of the package of that name.
    packages=sorted({"clinattn", *find_packages(include=["clinattn.*"]), "clinattn.kernels"}),
    package_dir={"clinattn.kernels": "kernels"},
    **extensions(),
)
