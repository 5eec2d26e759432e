"""The modules of build_support: `from building import cuda, flags`.

That package is loaded from its folder: the root of the repository stays off sys.path, where its
folder kernels/ would shadow another package.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location

from places import ROOT

if "build_support" not in sys.modules:
    _spec = spec_from_file_location("build_support", ROOT / "build_support" / "__init__.py")
    assert _spec is not None and _spec.loader is not None
    sys.modules["build_support"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["build_support"])

from build_support import (  # noqa: E402
    cuda,
    extension,
    flags,
    folders,
    ninja,
    sources,
    toolchain,
    torch_here,
)

__all__ = [
    "cuda", "extension", "flags", "folders", "ninja", "sources", "toolchain", "torch_here",
]  # fmt: skip
