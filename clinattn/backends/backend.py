"""The records by which select.py knows a backend: what it computes, and where it can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from clinattn.backends.call import Arguments, Incoming, Summary

Summarises = Callable[[Arguments, Summary, int, int], tuple[torch.Tensor, torch.Tensor]]


class Implementation(NamedTuple):
    """The two passes of a backend, and summaries of the weights.

    forward(call) returns (o, lse, lse_low), where None stands for an lse_low of zeros.
    backward(call, incoming, needs) returns the Gradients; those that `needs` leaves out are empty.
    summary(call, inputs, reduce, top) returns (values, places), where reduce is one of
    call.RECEIVED to call.TOPK, and places is empty for all but the last. None where select.SERVES
    does not name it.
    """

    name: str
    forward: Callable[[Arguments], tuple[Any, ...]]
    backward: Callable[[Arguments, Incoming, int], tuple[torch.Tensor, ...]]
    summary: Summarises | None = None


def of_ops(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    summary: Callable[..., Any],
) -> Implementation:
    """Returns the Implementation by three ops, whose arguments are the fields of the records."""
    return Implementation(
        name,
        lambda call: forward(*call),
        lambda call, incoming, needs: backward(*incoming, *call, needs),
        lambda call, inputs, reduce, top: summary(*inputs, *call, reduce, top),
    )


class Backend(NamedTuple):
    """A backend before it is loaded.

    reasons_against(device): the reasons why the backend cannot run on a device, or for None on this
    machine; empty when it can. load(): imports the backend and returns what it computes. notes():
    remarks for users on a backend that can run.
    """

    name: str
    reasons_against: Callable[[torch.device | None], list[str]]
    load: Callable[[], Implementation]
    notes: Callable[[], tuple[str, ...]] = tuple
