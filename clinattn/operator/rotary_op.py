"""The op clinattn::rotary: schema, fake, vmap rule, its definition in plain torch, and routing.

q (B, H, N, D), k (B, Hkv, N, D) with positions (N,) or (B, N); packed q (T, H, D), k (T, Hkv, D)
with positions (T,). frequencies: (R/2,) radians for each unit of the positions; the first R
features are turned, by the negative angle if inverse. Angles are in the dtype of positions and
frequencies: fp32, or fp64 for fp64 q.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinattn.backends.select import implementation
from clinattn.operator.ops import LIB, with_unit_last_stride

ARGS = "Tensor q, Tensor k, Tensor positions, Tensor frequencies, bool interleaved, bool inverse"

LIB.define(f"rotary({ARGS}, str backend) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
LIB.define(f"cpu_rotary({ARGS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)


def pairs_of(x: Tensor, width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second of each pair among the first `width` features."""
    if interleaved:
        return x[..., 0:width:2], x[..., 1:width:2]
    return x[..., : width // 2], x[..., width // 2 : width]


@torch.no_grad()  # exported programs call the op outside its Function
def reference_rotary(
    q: Tensor, k: Tensor, positions: Tensor, frequencies: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    angles = positions[..., None] * frequencies
    if q.dim() == 3 or positions.dim() == 2:
        angles = angles.unsqueeze(1)  # (T, 1, R/2) or (B, 1, N, R/2)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin
    width = 2 * frequencies.shape[0]

    def turned(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        a, b = (half.to(cos.dtype) for half in pairs_of(x, width, interleaved))
        first, second = pairs_of(out, width, interleaved)
        first.copy_(a * cos - b * sin)
        second.copy_(b * cos + a * sin)
        out[..., width:] = x[..., width:]
        return out

    return turned(q), turned(k)


@functools.cache
def _load(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if backend == "cpu":
        return torch.ops.clinattn.cpu_rotary.default
    if backend == "triton":
        return importlib.import_module("clinattn.kernels.rotary").rotary
    return reference_rotary


def rotary(
    q: Tensor, k: Tensor, positions: Tensor, frequencies: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Has a backend turn q and k; it may rely on last strides of 1 and contiguous positions."""
    *args, backend = rest
    q, k = with_unit_last_stride(q), with_unit_last_stride(k)
    call = _load(implementation(backend, q).name)
    return call(q, k, positions.contiguous(), frequencies.contiguous(), *args)


def rotary_fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(with_unit_last_stride(q)), torch.empty_like(with_unit_last_stride(k))


LIB.impl("rotary", rotary, "CompositeExplicitAutograd")
for _name in ("rotary", "cpu_rotary"):
    torch.library.register_fake(f"clinattn::{_name}", rotary_fake, lib=LIB)


def _vmap_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Folds the new dimension into the batch; packed tokens become the rows of a dense batch."""
    if in_dims[3] is not None:
        raise NotImplementedError("clinattn: vmap over the frequencies of rotary is not defined")
    size = info.batch_size
    q, k, positions = (
        x if dim is None else x.movedim(dim, 0)
        for x, dim in zip(args[:3], in_dims[:3], strict=True)
    )
    q, k = (
        x.expand(size, *x.shape) if dim is None else x
        for x, dim in zip((q, k), in_dims[:2], strict=True)
    )
    if q.dim() == 4:
        turned = torch.ops.clinattn.rotary(
            q.transpose(1, 2), k.transpose(1, 2), positions, *args[3:]
        )
        return tuple(x.transpose(1, 2) for x in turned), (0, 0)
    batch, tokens = q.shape[1], q.shape[3]
    if in_dims[2] is not None and positions.dim() == 2:
        positions = positions[:, None]
    if positions.dim() > 1:
        positions = positions.expand(size, batch, tokens).flatten(0, 1)
    turned = torch.ops.clinattn.rotary(q.flatten(0, 1), k.flatten(0, 1), positions, *args[3:])
    return tuple(x.unflatten(0, (size, batch)) for x in turned), (0, 0)


torch.library.register_vmap("clinattn::rotary", _vmap_rule, lib=LIB)
