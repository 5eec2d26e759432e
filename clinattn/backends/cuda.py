"""The compiled CUDA kernels: where they can run, and on which cards they were verified."""

from __future__ import annotations

import shutil

import torch

from clinattn.backends import compiled
from clinattn.backends.backend import Backend, Implementation, of_ops

# The kernels use the tensor cores of Turing and newer cards.
CAPABILITY = (7, 5)
# Cards, by compute capability, on which the kernels passed the whole test table of `make gpu`;
# bench/results/ holds the rows of each.
VERIFIED: frozenset[tuple[int, int]] = frozenset()


def reasons_against(device: torch.device | None = None) -> list[str]:
    """Returns why the kernels cannot run, here or on the given device; empty when they can."""
    if device is not None and device.type != "cuda":
        return [f"it serves CUDA tensors, and these are on {device}"]
    if compiled.extension_error is not None or "cuda_archs" not in compiled.build_info:
        return [_missing()]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return [f"compute capability {dotted(capability)} < {dotted(CAPABILITY)} that it needs"]
    archs = compiled.build_info["cuda_archs"].split(",")
    if not any(_runs_on(arch, capability) for arch in archs):
        return [
            f"it was compiled for {', '.join(archs)} and this card is {dotted(capability)}; "
            f"TORCH_CUDA_ARCH_LIST={dotted(capability)} make ext builds it"
        ]
    return []


def _missing() -> str:
    """Returns why the library has no CUDA kernels, and what to install for them."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch and "
            "the CUDA toolkit, then clinattn again"
        )
    why = compiled.extension_error or "clinattn was built without its CUDA kernels"
    toolkit = "" if shutil.which("nvcc") else f" the CUDA toolkit {torch.version.cuda} (nvcc) and"
    return (
        f"{why}; with{toolkit} a C++ compiler and ninja at hand, "
        "`CLINATTN_CUDA=1 pip install --no-build-isolation .` builds them"
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Returns whether kernels that were compiled for `arch` run on a card of this capability.

    Machine code runs on cards of the same major version whose minor version is not lower. With
    +PTX it runs on all later cards, too, except that +PTX of 7.x does not serve cards from 8.0 on:
    these have kernels of their own, which it lacks.
    """
    number, _, ptx = arch.partition("+")
    major, minor = map(int, number.split("."))
    later = bool(ptx) and (major >= 8 or capability[0] < 8)
    return (major, minor) <= capability and (later or major == capability[0])


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def verification() -> str:
    """Returns a remark that says whether the kernels were verified on such a card."""
    if torch.cuda.get_device_capability() in VERIFIED:
        return "compiled, verified on such a card"
    return "compiled, not yet verified on this card"


def load() -> Implementation:
    ops = torch.ops.clinattn
    passes = (ops.cuda_forward, ops.cuda_backward, ops.cuda_summary)
    return of_ops("cuda", *(op.default for op in passes))


BACKEND = Backend("cuda", reasons_against, load, notes=lambda: (verification(),))
