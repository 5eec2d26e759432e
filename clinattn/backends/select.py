"""Chooses the backend of a call, and says why the others cannot compute it."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any, NamedTuple

import torch

from clinattn.backends import compiled, cpu, cuda, triton
from clinattn.backends.backend import Backend, Implementation
from clinattn.backends.call import FEATURE_SCALARS, MAX_HEAD_DIM, NEEDS, Arguments

NAMES = ("triton", "cuda", "cpu", "reference")
VARIABLE = "CLINATTN_BACKEND"

LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = {
    "triton": (torch.float32, *LOW_PRECISION),
    "cuda": (torch.float32, *LOW_PRECISION),
    "cpu": (torch.float64, torch.float32, *LOW_PRECISION),
    "reference": (torch.float64, torch.float32, *LOW_PRECISION),
}

# Public arguments behind fields of a call.
WORDS = {
    "lo": "segment_ids or time_window",
    "decay": "time_decay",
    "slopes": "alibi_slopes",
    "relative": "relative_bias",
}
# Features of a call beyond masks, windows and lengths, by the names of the public arguments.
GRADIENTS = tuple(  # in the order of NEEDS
    f"the gradient of {word}"
    for word in ("attn_mask", "time_decay", "alibi_slopes", "relative_bias")
)
IN_KERNELS = (*WORDS.values(), *FEATURE_SCALARS, *GRADIENTS)
WIDE = f"head_dim above {MAX_HEAD_DIM}"
FEATURES = (*IN_KERNELS, WIDE)
SUMMARIES = "attention_summary"


class Serves(NamedTuple):
    """The FEATURES that each of the two passes of a backend computes; the first, SUMMARIES, too."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


SERVES = {
    "triton": Serves(forward=(*IN_KERNELS, SUMMARIES), backward=IN_KERNELS),
    "cuda": Serves(forward=(*IN_KERNELS, SUMMARIES), backward=IN_KERNELS),
    "cpu": Serves(forward=(*IN_KERNELS, SUMMARIES), backward=IN_KERNELS),
    "reference": Serves(forward=(*FEATURES, SUMMARIES), backward=FEATURES),
}


class Status(NamedTuple):
    """The state of a backend here: true when it can run, else false with the reasons."""

    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()  # remarks on a backend that can run

    def __bool__(self) -> bool:
        return not self.reasons

    def __repr__(self) -> str:
        if not self:
            return "not usable: " + "; ".join(self.reasons)
        return f"usable ({'; '.join(self.notes)})" if self.notes else "usable"


class Statuses(dict[str, Status]):
    def __repr__(self) -> str:
        return "\n".join(f"{name:<10} {status!r}" for name, status in self.items())


def backends() -> dict[str, Status]:
    """Returns the Status of each backend by name: true when usable here, else the reasons."""
    return Statuses({name: _status(name) for name in NAMES})


def _status(name: str) -> Status:
    reasons = reasons_against(name)
    return Status(tuple(reasons), () if reasons else _registered[name].notes())


def reasons_against(name: str, device: torch.device | None = None) -> list[str]:
    """Returns why this backend cannot run, here or on the given device; empty when it can."""
    return _registered[name].reasons_against(device)


def asked_for(call: Arguments, needs: int) -> tuple[str, ...]:
    """Returns the FEATURES that a call has, the gradients in `needs` among them."""
    wide = call.q.shape[-1] > MAX_HEAD_DIM or call.v.shape[-1] > MAX_HEAD_DIM
    if call.is_plain() and call.lo is None and not (call.global_prefix or needs or wide):
        return ()
    asked = (
        *(getattr(call, field) is not None for field in WORDS),
        *(getattr(call, name) != 0 for name in FEATURE_SCALARS),
        *(needs & bit for bit in NEEDS.values()),
        wide,
    )
    return tuple(name for name, wanted in zip(FEATURES, asked, strict=True) if wanted)


# os.environ.get takes 0.5 us, where nothing is found.
_variables: Any = getattr(os.environ, "_data", os.environ)
_FORCED = VARIABLE if _variables is os.environ else os.environ.encodekey(VARIABLE)


def prefers_cpu() -> bool:
    """Returns whether calls with CPU tensors that name no backend go to the compiled kernels."""
    return (
        compiled.extension_error is None
        and _registered["cpu"] is cpu.BACKEND
        and (_FORCED not in _variables or os.environ[VARIABLE] in ("", "cpu"))
    )


def implementation(
    name: str, tensor: torch.Tensor, asked: tuple[str, ...] = (), *, backward: bool = False
) -> Implementation:
    """Returns the Implementation for a tensor's device and dtype.

    name: the backend asked for, or "" for that of CLINATTN_BACKEND or the best one. asked: the
    FEATURES of the call.
    """
    name = name or os.environ.get(VARIABLE, "")
    return _select(name, tensor.device, tensor.dtype, asked, backward)


def _unserved(name: str, dtype: torch.dtype, asked: tuple[str, ...], backward: bool) -> list[str]:
    """Returns the dtype and the FEATURES of a call that a backend does not compute."""
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
    return _registered[name].load()


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


def _load_reference() -> Implementation:
    reference = importlib.import_module("clinattn.backends.reference.attention")
    summary = importlib.import_module("clinattn.backends.reference.summary")
    return Implementation(
        "reference",
        reference.attention_forward,
        reference.attention_backward,
        summary.attention_summary,
    )


_registered: dict[str, Backend] = {}


def register(backend: Backend) -> Backend | None:
    """Puts a backend behind its name from the next call on; returns the previous one."""
    before = _registered.get(backend.name)
    _registered[backend.name] = backend
    for chosen in (_select, _load):
        chosen.cache_clear()
    return before


for _backend in (
    triton.BACKEND,
    cuda.BACKEND,
    cpu.BACKEND,
    Backend("reference", lambda device: [], _load_reference),
):
    register(_backend)
