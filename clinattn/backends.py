"""What can run here, and why not."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from clinattn import compiled, cuda_kernels
from clinattn.arguments import NEEDS, Arguments
from clinattn.cuda_kernels import dotted

NAMES = ("triton", "cuda", "cpu", "reference")

LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = {
    "triton": (torch.float32, *LOW_PRECISION),
    "cuda": (torch.float32, *LOW_PRECISION),
    "cpu": (torch.float64, torch.float32, *LOW_PRECISION),
    "reference": (torch.float64, torch.float32, *LOW_PRECISION),
}

# What a call may ask for beyond masks, windows and lengths, in the user's words.
GRADIENTS = tuple(  # in the order of NEEDS
    f"the gradient of {word}"
    for word in ("attn_mask", "time_decay", "alibi_slopes", "relative_bias")
)
FEATURES = (
    *("segment_ids or time_window", "time_decay", "alibi_slopes", "relative_bias", "softcap"),
    *("global_prefix", "dropout_p", *GRADIENTS),
)


class Serves(NamedTuple):
    """Those of FEATURES that a backend's two passes know."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


SERVES = {
    "triton": Serves(forward=FEATURES, backward=FEATURES),
    "cuda": Serves(forward=FEATURES, backward=FEATURES),
    "cpu": Serves(forward=FEATURES, backward=FEATURES),
    "reference": Serves(forward=FEATURES, backward=FEATURES),
}

# Triton generates code for compute capability 8.0 and newer.
TRITON_CAPABILITY = (8, 0)

# What torch.get_float32_matmul_precision says, as the kernels for CPUs take it
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}

# registers clinattn::cpu_forward and cpu_backward, and perhaps cuda_forward and cuda_backward
_module, extension_error = compiled.load()
build_info: dict[str, str] = {} if _module is None else _module.build_info()


class Status(NamedTuple):
    """Whether a backend can run here; true when it can, else it carries the reasons why not."""

    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what to know of one that can

    def __bool__(self) -> bool:
        return not self.reasons

    def __repr__(self) -> str:
        if not self:
            return "not usable: " + "; ".join(self.reasons)
        return f"usable ({'; '.join(self.notes)})" if self.notes else "usable"


class Statuses(dict[str, Status]):
    def __repr__(self) -> str:
        return "\n".join(f"{name:<10} {status!r}" for name, status in self.items())


class Implementation(NamedTuple):
    """The two functions behind a backend; their arguments are those of the ops, less `backend`.

    forward gives None for an lse_low that would be zeros. takes_precision: both functions take
    matmul_precision() as a last argument.
    """

    name: str
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    takes_precision: bool = False


def backends() -> dict[str, Status]:
    """For each backend, by name: usable here (true), or the reasons why not (false)."""
    return Statuses({name: _status(name) for name in NAMES})


def _status(name: str) -> Status:
    reasons = reasons_against(name)
    if reasons or name != "cuda":
        return Status(tuple(reasons))
    return Status((), (cuda_kernels.verification(),))


def triton_interpreter() -> bool:
    """Whether Triton kernels run in Python on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def triton_error() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton does not load ({error}); pip install triton"
    try:
        importlib.import_module("clinattn.kernels.forward")
        importlib.import_module("clinattn.kernels.backward")
    except Exception as error:  # a Triton too old or broken raises all kinds of errors
        return f"its kernels cannot be imported ({type(error).__name__}: {error})"
    return None


def reasons_against(name: str, device: torch.device | None = None) -> list[str]:
    """Why this backend cannot run, here or on the given device; empty when it can."""
    if name == "reference":
        return []
    if name == "cpu":
        reasons = []
        if extension_error is not None:
            reasons.append(
                f"{extension_error}; with a C++ compiler and ninja at hand, "
                "`pip install --no-build-isolation .` builds it"
            )
        if device is not None and device.type != "cpu":
            reasons.append(f"it serves CPU tensors, and these are on {device}")
        return reasons
    if name == "cuda":
        return cuda_kernels.reasons_against(device, extension_error, build_info)
    return _reasons_against_triton(device)


def _reasons_against_triton(device: torch.device | None) -> list[str]:
    error = triton_error()
    if error is not None:
        return [error]
    if triton_interpreter() and (device is None or device.type == "cpu"):
        return []
    if device is not None and device.type != "cuda":
        return [f"it serves CUDA tensors, and these are on {device}; TRITON_INTERPRET=1 runs it"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device; TRITON_INTERPRET=1 runs it on CPU tensors, slowly"]
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        need = dotted(TRITON_CAPABILITY)
        return [f"compute capability {dotted(capability)} < {need} that Triton needs"]
    return []


def asked_for(
    needs: int,
    mask: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    q_lengths: Any,
    kv_start: Any,
    kv_end: Any,
    lo: Any,
    hi: Any,
    times: Any,
    decay: Any,
    slopes: Any,
    relative: Any,
    seed: Any,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    softcap: float,
    global_prefix: int,
    dropout_p: float,
) -> tuple[str, ...]:
    """Those of FEATURES that a call asks for; after `needs`, the ops' arguments from mask on."""
    no_tensors = lo is decay is slopes is relative is seed is None
    if no_tensors and not (softcap or global_prefix or needs):
        return ()
    asked = (
        *(lo is not None, decay is not None, slopes is not None, relative is not None),
        *(softcap != 0, global_prefix != 0, seed is not None),
        *(needs & bit for bit in NEEDS.values()),
    )
    return tuple(name for name, wanted in zip(FEATURES, asked, strict=True) if wanted)


def support_table() -> str:
    """Arguments x backends in Markdown, as docs/operator.md shows it."""
    rows = [("argument", *NAMES), ("---",) * (len(NAMES) + 1)]
    rows.append(("masks, causal, windows, lengths, packed sequences", *["fwd, bwd"] * len(NAMES)))
    for feature in FEATURES:
        cells = []
        for name in NAMES:
            served = SERVES[name]
            passes = [
                word
                for word, known in (("fwd", served.forward), ("bwd", served.backward))
                if feature in known and not (feature in GRADIENTS and word == "fwd")
            ]
            cells.append(", ".join(passes) or "reference")
        rows.append((feature, *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def implementation(
    name: str, tensor: torch.Tensor, asked: tuple[str, ...] = (), *, backward: bool = False
) -> Implementation:
    """The implementation for a tensor's device and dtype; `name` "" lets this module choose."""
    name = name or os.environ.get("CLINATTN_BACKEND", "")
    return _select(name, tensor.device, tensor.dtype, asked, backward)


def _unserved(name: str, dtype: torch.dtype, asked: tuple[str, ...], backward: bool) -> list[str]:
    """What a call asks for that a backend does not compute, in the user's words."""
    served = SERVES[name].backward if backward else SERVES[name].forward
    return [str(dtype)] * (dtype not in DTYPES[name]) + [x for x in asked if x not in served]


@functools.cache
def _select(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    asked: tuple[str, ...] = (),
    backward: bool = False,
) -> Implementation:
    if name:
        return _by_name(name, device, dtype, asked, backward)
    preferred = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}.get(device.type, ())
    against = {}
    for candidate in preferred:
        reasons = reasons_against(candidate, device)
        if not reasons:
            reasons = [
                f"it does not serve {x}" for x in _unserved(candidate, dtype, asked, backward)
            ]
        if not reasons:
            return _load(candidate)
        against[candidate] = "; ".join(reasons)
    if unserved := _unserved("reference", dtype, asked, backward):
        raise NotImplementedError(f"no backend serves {', '.join(unserved)} yet")
    _warn_about_reference(device, against)
    return _load("reference")


def _by_name(
    name: str, device: torch.device, dtype: torch.dtype, asked: tuple[str, ...], backward: bool
) -> Implementation:
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(NAMES)}")
    reasons = reasons_against(name, device)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot be used: {'; '.join(reasons)}")
    unserved = _unserved(name, dtype, asked, backward)
    if unserved:
        able = [other for other in NAMES if not _unserved(other, dtype, asked, backward)]
        raise NotImplementedError(
            f"backend {name!r} does not serve {', '.join(unserved)}"
            f"{' in the backward pass' if backward else ''}; "
            f"these do: {', '.join(able) or 'none'}"
        )
    return _load(name)


@functools.cache
def _load(name: str) -> Implementation:
    ops = torch.ops.clinattn
    if name == "cpu":
        return Implementation(name, ops.cpu_forward.default, ops.cpu_backward.default, True)
    if name == "cuda":
        return Implementation(name, ops.cuda_forward.default, ops.cuda_backward.default)
    if name == "triton":
        forward = importlib.import_module("clinattn.kernels.forward")
        backward = importlib.import_module("clinattn.kernels.backward")
        return _with_arguments(name, forward.attention_forward, backward.attention_backward)
    reference = importlib.import_module("clinattn.reference")
    return Implementation(name, reference.attention_forward, reference.attention_backward)


def matmul_precision() -> int:
    """The precision of products in fp32 that torch is set to, of PRECISIONS."""
    try:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch's old and new settings contradict each other
        return PRECISIONS["highest"]


def _with_arguments(
    name: str,
    forward: Callable[..., tuple[torch.Tensor | None, ...]],
    backward: Callable[..., tuple[torch.Tensor, ...]],
) -> Implementation:
    """A backend that takes Arguments."""

    def forward_of(*args: Any) -> tuple[torch.Tensor | None, ...]:
        return forward(Arguments(*args))

    def backward_of(
        do: Any, dlse: Any, o: Any, lse: Any, lse_low: Any, *args: Any
    ) -> tuple[torch.Tensor, ...]:
        return backward(do, dlse, o, lse, lse_low, Arguments(*args[:-1]), args[-1])

    return Implementation(name, forward_of, backward_of)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _warn_about_reference(device: torch.device, against: dict[str, str]) -> None:
    why = ". ".join(f"{name}: {reason}" for name, reason in against.items())
    _warn_once(
        f"clinattn falls back to its slow reference backend on {device.type}. "
        f"{why or f'No other backend serves {device.type} tensors'}. "
        "See clinattn.backends(); backend='reference' asks for it without this warning."
    )
