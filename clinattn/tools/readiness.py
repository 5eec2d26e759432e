"""Readiness of clinattn on this machine: calls that name no backend are computed by kernels."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import torch

from clinattn.backends import select
from clinattn.backends.triton import triton_interpreter
from clinattn.integrations.replace import several
from clinattn.operator.attention import fused_attention
from clinattn.tools import installation
from clinattn.tools.instruction_sets import VARIABLE as ISA_VARIABLE


class Readiness(NamedTuple):
    """ready: what computes. Else what is in the way, and the remedy."""

    ready: bool
    what: str
    remedy: str | None = None

    def __str__(self) -> str:
        return f"ready: {self.what}" if self.ready else f"not ready: {self.what}; {self.remedy}"


def readiness(device: torch.device, in_force: str | None, refused: str | None) -> Readiness:
    """Tries a call of both passes on a device.

    in_force: the instruction set of the CPU kernels. refused: why CLINATTN_CPU_ISA is not followed.
    """
    if refused is not None:
        return Readiness(False, f"{ISA_VARIABLE}: {refused}", f"unset {ISA_VARIABLE}")
    forced = os.environ.get(select.VARIABLE, "")
    try:
        name = _tried(device)
    except Exception as error:  # whatever stands in the way of a user's call
        remedy = f"unset {select.VARIABLE}" if forced else "install clinattn again"
        return Readiness(False, " ".join(str(error).split()), remedy)
    if name == "reference":
        if forced:
            what = f"{select.VARIABLE}={forced} leaves every call to the slow reference"
            return Readiness(False, what, f"unset {select.VARIABLE}")
        what = f"the slow reference computes every call on {device.type}"
        if device.type == "cpu":
            what += f" (kernels {installation.kernels()})"
            return Readiness(False, what, installation.to_build())
        return Readiness(False, what, "the table of backends says what the kernels need")
    if name == "triton" and triton_interpreter():
        what = "TRITON_INTERPRET runs the Triton kernels in Python, very slowly"
        return Readiness(False, what, "unset TRITON_INTERPRET")
    if name == "cpu":
        threads = several(torch.get_num_threads(), "thread")
        return Readiness(True, f"cpu kernels ({in_force}), {threads}")
    return Readiness(True, f"{name} kernels on {torch.cuda.get_device_name(device)}")


def _tried(device: torch.device) -> str:
    """The name of the backend that a call gets, after both passes of one have run."""
    q = torch.ones((1, 1, 8, 16), device=device, requires_grad=True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of the reference, which the caller names
        name = select.implementation("", q).name
        torch.autograd.grad(fused_attention(q, q, q).sum(), q)
    return name
