"""torch.nn.attention.varlen's attention over packed sequences, by fused_attention_varlen.

varlen_attn and varlen_attn_out check heads and call an op each, torch_attn::_varlen_attn and
_varlen_attn_out; the ops are what is replaced, however the caller got hold of the functions. Theirs
run on CUDA in 16 bits; here they have every device and dtype of fused_attention_varlen.

Releases of torch give the ops more arguments and in another order: each is known by its name, and a
name that is not known here is refused unless it is None.

As there: windows and causal order are aligned at the last query and the last key of a sequence;
key and value are of the first seqused_k tokens of each, or in pages, which is for inference only;
lse is (H, Tq). Unlike there, a query that sees no key has lse = -inf.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.library import Library

from clinattn.integrations.flash_attn.used import used_keys
from clinattn.integrations.flash_attn.words import band
from clinattn.operator.attention import fused_attention_varlen
from clinattn.operator.words.scalars import as_int

NAMESPACE = "torch_attn"
DEVICES = ("CPU", "CUDA")


def _varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (Tq, H, D), lse (H, Tq), the state of a generator that is not used).

    num_splits: how to share out the work, which changes no bit here.
    """
    window = band(is_causal, (-1, -1) if window_size is None else tuple(window_size))
    if num_splits is not None:
        as_int("num_splits", num_splits)
    if block_table is None and cu_seq_k is None:
        raise ValueError("cu_seq_k: got None without block_table, expected the ends of the keys")
    if block_table is not None and seqused_k is None:
        raise ValueError("seqused_k: got None with block_table, expected the lengths of sequences")
    if seqused_k is not None:
        _check_inference(query, key, value)
    key, value, cu_seq_k = used_keys(key, value, cu_seq_k, cu_seq_q, block_table, seqused_k)
    o, lse = fused_attention_varlen(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        enable_gqa=enable_gqa,
        window=window,
        bottom_right=True,
        return_lse=True,
    )
    return o, lse, torch.zeros(2, dtype=torch.uint64, device=query.device)


def _varlen_attn_out(out: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Writes into out what _varlen_attn returns, without a gradient, and returns lse."""
    if out.shape != query.shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"out: got {out.dtype} {tuple(out.shape)} on {out.device}, expected that of query, "
            f"{query.dtype} {tuple(query.shape)} on {query.device}"
        )
    with torch.no_grad():
        o, lse, _ = _varlen_attn(query, *args, **kwargs)
        out.copy_(o)
    return lse


OPS: dict[str, Any] = {"_varlen_attn": _varlen_attn, "_varlen_attn_out": _varlen_attn_out}
KNOWN = tuple(inspect.signature(_varlen_attn).parameters)
CHOICES = ("backend",)  # of a kernel of torch's: 2.15


@torch.compiler.assume_constant_result
def _names(name: str) -> str:
    """Returns the names of the arguments of torch's op, in its order, with a space between."""
    schema = getattr(torch.ops.torch_attn, name).default._schema
    return " ".join(x.name for x in schema.arguments)


def _by_name(name: str) -> Any:
    """Returns the function of OPS as torch's op of that name is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        names = _names(name).split()
        given = dict(zip(names, args, strict=False)) | kwargs
        first = [given.pop("out")] if "out" in given else []
        for word in [x for x in given if x not in KNOWN]:
            if given.pop(word) is not None and word not in CHOICES:
                raise NotImplementedError(f"{word}: got one, expected None: it is not served")
        if "enable_gqa" not in names:  # 2.11, whose kernel shares heads unasked
            given["enable_gqa"] = True
        return OPS[name](*first, **given)

    return call


def replace_ops() -> Library:
    """The ops are those above until the library that is returned is dropped.

    Torch defines the ops where torch.nn.attention.varlen is imported, which may come later.
    """
    library = Library(NAMESPACE, "IMPL")
    for name in OPS:
        function = _by_name(name)
        for device in DEVICES:
            library.impl(name, function, device)
            library.impl(name, _below_transforms(name, function), f"Autograd{device}")
    return library


def _below_transforms(name: str, function: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():  # below them, where no Function can run
            raise NotImplementedError(
                f"{name}: got a call within torch.func, which an activated clinattn does not "
                "transform, expected one in a block of clinattn.integrations.sdpa.sdpa()"
            )
        return function(*args, **kwargs)

    return kernel


def replacement(op: OpOverloadPacket, *args: Any) -> Any:
    """Returns the function above that op is replaced by where the tensors are, or None."""
    for name in OPS:
        if op is getattr(torch.ops.torch_attn, name, None):
            return _by_name(name) if args[0].device.type in ("cpu", "cuda") else None
    return None


def _check_inference(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            "seqused_k and block_table: got one with inputs that require a gradient, expected a "
            "call under torch.no_grad(): they are for inference only"
        )
