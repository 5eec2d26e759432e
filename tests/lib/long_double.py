"""Tensors that compute in numpy's long double (64 bits of mantissa on x86): the truth for fp64.

    truth = functional_call(model, {name: LongDouble.of(p), ...}, args).rounded()

They pass for fp64 tensors, so a model and autograd run on them unchanged.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import clinattn  # noqa: F401  (registers torch.ops.clinattn)

aten = torch.ops.aten


class LongDouble(Tensor):
    """Views are numpy's views, so that what is written to one shows in the other."""

    array: np.ndarray

    @staticmethod
    def __new__(cls, array: np.ndarray):
        return Tensor._make_wrapper_subclass(cls, array.shape, dtype=torch.float64)

    def __init__(self, array: np.ndarray):
        self.array = array

    @classmethod
    def of(cls, x: Tensor) -> LongDouble:
        return cls(wide(x))

    def rounded(self) -> Tensor:
        return torch.from_numpy(self.array.astype(np.float64))

    def __repr__(self) -> str:
        return f"LongDouble({self.array})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in OPS:
            raise NotImplementedError(f"{func} in long double")
        out = OPS[func](*tree_map(wide, args), **tree_map(wide, kwargs or {}))
        if func is aten.copy_.default:
            return args[0]
        return tree_map(lambda x: cls(x) if isinstance(x, np.ndarray | np.longdouble) else x, out)


def wide(x):
    """Anything a tensor op takes, with numpy arrays for tensors."""
    if isinstance(x, LongDouble):
        return x.array
    if isinstance(x, Tensor):
        x = x.detach().numpy()
        return x.astype(np.longdouble) if x.dtype.kind == "f" else x
    return x


def erf(x: np.ndarray) -> np.ndarray:
    """2/sqrt(pi) e^(-x^2) sum 2^n x^(2n+1) / (2n+1)!!, whose terms have one sign; 1 beyond 7."""
    x = np.clip(x, -7, 7)
    term = total = x
    n = 0
    while np.any(np.abs(term) > np.finfo(np.longdouble).eps * np.abs(total)):
        n += 1
        term = term * (2 * x * x / (2 * n + 1))
        total = total + term
    pi = 4 * np.arctan(np.longdouble(1))
    return 2 / np.sqrt(pi) * np.exp(-x * x) * total


def gelu(x, approximate="none"):
    return x * (1 + erf(x / np.sqrt(np.longdouble(2)))) / 2


def gelu_backward(grad, x, approximate="none"):
    density = np.exp(-x * x / 2) / np.sqrt(8 * np.arctan(np.longdouble(1)))
    return grad * ((1 + erf(x / np.sqrt(np.longdouble(2)))) / 2 + x * density)


def layer_norm(x, shape, weight, bias, eps):
    mean = x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    out = (x - mean) * rstd * weight
    return (out if bias is None else out + bias), mean, rstd


def layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, mask):
    normal, g = (x - mean) * rstd, grad * weight
    dx = rstd * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return dx, (grad * normal).sum(rows), grad.sum(rows) if mask[2] else None


def softmax(x, dim, half_to_float=False):
    p = np.exp(x - x.max(dim, keepdims=True))
    return p / p.sum(dim, keepdims=True)


def embedding_backward(grad, indices, rows, padding_idx, by_frequency):
    out = np.zeros((rows, grad.shape[-1]), np.longdouble)
    np.add.at(out, indices, grad)
    return out


def sum_over(x, dim=None, keepdim=False, dtype=None):
    return x.sum(None if dim is None else tuple(dim), keepdims=keepdim)


def put(shape, dim, where, grad):
    """Zeros of a shape with grad in one place."""
    out = np.zeros(shape, np.longdouble)
    out[(slice(None),) * (dim % len(shape)) + (where,)] = grad
    return out


def at(x, dim, where):
    return x[(slice(None),) * (dim % x.ndim) + (where,)]


def split(x, size, dim=0):
    return [at(x, dim, slice(i, i + size)) for i in range(0, x.shape[dim], size)]


def rotary(q, k, positions, frequencies, interleaved, inverse, backend):
    """Rotates the pairs (i, i + D / 2), as the encoder does."""
    angles = positions[..., None] * frequencies
    if q.ndim == 3 or positions.ndim == 2:
        angles = np.expand_dims(angles, 1)
    cos, sin = np.cos(angles), np.sin(-angles if inverse else angles)
    pairs = [np.split(x, 2, -1) for x in (q, k)]
    turned = [(a * cos - b * sin, b * cos + a * sin) for a, b in pairs]
    return [np.concatenate(x, -1) for x in turned]


OPS = {
    torch.ops.clinattn.rotary.default: rotary,
    aten.add.Tensor: lambda x, y, alpha=1: x + alpha * y,
    aten.mul.Tensor: lambda x, y: x * y,
    aten.mul.Scalar: lambda x, y: x * y,
    aten.addcmul.default: lambda x, y, z, value=1: x + value * y * z,
    aten.mm.default: lambda x, y: x @ y,
    aten.bmm.default: lambda x, y: x @ y,
    aten.addmm.default: lambda bias, x, y: bias + x @ y,
    aten.sum.default: sum_over,
    aten.sum.dim_IntList: sum_over,
    aten.gelu.default: gelu,
    aten.gelu_backward.default: gelu_backward,
    aten.native_layer_norm.default: layer_norm,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten._safe_softmax.default: softmax,
    aten._softmax_backward_data.default: lambda grad, p, dim, dtype: (
        p * (grad - (grad * p).sum(dim, keepdims=True))
    ),
    aten.embedding.default: lambda weight, indices, *_: weight[indices],
    aten.embedding_dense_backward.default: embedding_backward,
    aten.detach.default: lambda x: x,
    aten.empty_like.default: lambda x, **_: np.empty_like(x, order="C", subok=False),
    aten.ones_like.default: lambda x, **_: np.ones_like(x),
    aten.copy_.default: lambda x, y, non_blocking=False: np.copyto(x, y),
    aten.view.default: lambda x, shape: x.reshape(shape),
    aten._unsafe_view.default: lambda x, shape: x.reshape(shape),
    aten.t.default: lambda x: x.T,
    aten.transpose.int: lambda x, a, b: x.swapaxes(a, b),
    aten.expand.default: np.broadcast_to,
    aten.unbind.int: lambda x, dim=0: [at(x, dim, i) for i in range(x.shape[dim])],
    aten.split.Tensor: split,
    aten.cat.default: lambda xs, dim=0: np.concatenate(xs, dim),
    aten.stack.default: lambda xs, dim=0: np.stack(xs, dim),
    aten.select.int: at,
    aten.select_backward.default: lambda grad, shape, dim, i: put(shape, dim, i, grad),
    aten.slice.Tensor: lambda x, dim=0, a=None, b=None, step=1: at(x, dim, slice(a, b, step)),
    aten.slice_backward.default: lambda grad, shape, dim, a, b, step: put(
        shape, dim, slice(a, b, step), grad
    ),
}
