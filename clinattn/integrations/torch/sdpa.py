"""clinattn under F.scaled_dot_product_attention: for a whole program, or for a block.

    sdpa.register()                                              # a name in torch's registry
    torch.nn.attention.activate_flash_attention_impl("clinattn")
    torch.nn.attention.restore_flash_attention_impl()            # torch's own again

    with sdpa.sdpa():                                            # this block, this thread
        ...

Results and gradients are those of fused_attention, bit by bit, with all arguments of torch's.
Activated, it takes the place of aten::scaled_dot_product_attention itself on CPU and CUDA, one step
above torch's choice of a kernel. That choice would send dropout, grouped heads and masks with
gradients to plain maths on the CPU, and masks elsewhere on a GPU; here they are all served, however
the caller got hold of the function.

So are jagged nested tensors, over their packed tokens, and torch.nn.attention.varlen's functions.

Torch's own attention serves, after one warning for each reason, what fused_attention does not take:
types and devices that it does not know, strided nested tensors, tensor subclasses such as DTensor.
It serves without a warning where its own switches turn flash attention off, as
sdpa_kernel(SDPBackend.MATH) does, and, activated but not in a block, where torch.func transforms
the call; and it refuses what it always refused. An attn_mask together with is_causal=True, which
torch's own function refuses from 2.14 on, is served while clinattn is active in every torch: a key
is seen where both let it be seen.

nn.MultiheadAttention calls no attention function in eval mode without gradients: its fused path is
off while clinattn is active, in a block for this thread alone. Nested inputs, which torch takes on
that path only, are attention over packed sequences then, in training too. nn.TransformerEncoder
keeps what it computes in padding, where its fused path would return zeros. Calls with
need_weights=True, the default of nn.MultiheadAttention, form their weights in torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import Library
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from clinattn.integrations.torch import nested, varlen
from clinattn.integrations.torch.multihead import Weights, multi_head_attention
from clinattn.operator import split
from clinattn.operator.attention import fused_attention
from clinattn.operator.jagged import is_jagged
from clinattn.operator.words.checks import SERVED_DTYPES
from clinattn.operator.words.forms import dense_form, is_dense

_NAME = "clinattn"
_OP = torch.ops.aten.scaled_dot_product_attention.default
_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_FASTPATH = torch.backends.mha.get_fastpath_enabled
_warned: set[str] = set()


@torch.compiler.assume_constant_result
def _flash_is_on() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


def _limit(*tensors: Any) -> str | None:
    """Reason why clinattn does not take such tensors, or None."""
    x = tensors[0]
    if any(type(x) not in _PLAIN or x.is_nested for x in tensors):
        return "a nested tensor or tensor subclass was given"
    if x.device.type not in ("cpu", "cuda"):
        return f"the device is {x.device.type}"
    if x.dtype not in SERVED_DTYPES or (x.dtype == torch.float64 and x.is_cuda):
        return f"the inputs are {x.dtype} on {x.device.type}"
    return None


def _mismatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Reason why fused_attention refuses arguments, which torch may take or refuse, or None."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return "query, key or value has one dimension"
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return "query and key, or key and value, differ in shape"
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        return "head_dim is 0"
    leading: tuple[int, ...] = query.shape[:-2]
    if not is_dense(query.shape, key.shape, value.shape, enable_gqa):
        try:
            leading = dense_form(query, key, value, None, enable_gqa).leading
        except ValueError:
            return "query, key and value do not broadcast"
    elif key.shape[1] != leading[1]:
        if not enable_gqa or key.shape[1] == 0 or leading[1] % key.shape[1]:
            return "query and key differ in heads"
    if not (query.dtype == key.dtype == value.dtype):
        return "query, key and value differ in dtype"
    if not (query.device == key.device == value.device):
        return "query, key and value differ in device"
    if not 0.0 <= dropout_p <= 1.0:
        return "dropout_p is no probability"
    if attn_mask is None:
        return None
    if attn_mask.dtype not in (torch.bool, query.dtype) or attn_mask.device != query.device:
        return "attn_mask differs from query in dtype or device"
    full = (*leading, query.shape[-2], key.shape[-2])
    if attn_mask.dim() > len(full) or not all(
        n in (1, m) for n, m in zip(attn_mask.shape[::-1], full[::-1], strict=False)
    ):
        return "attn_mask does not broadcast to the scores"
    return None


def _attention(
    theirs: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """clinattn's answer to a call of torch's attention, or `theirs`, which may be an error."""
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    keywords: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if not _flash_is_on():
        return theirs(*args, **keywords)
    jagged, reason, given = is_jagged(query), None, args[:3]
    if jagged:
        reason = nested.mismatch(query, key, value, attn_mask, enable_gqa)
        given = given if reason else (query.values(), key.values(), value.values())
    reason = reason or _limit(*given, *(() if attn_mask is None else (attn_mask,)))
    reason = reason or _mismatch(*given, *args[3:], enable_gqa)
    if reason is not None:
        split.refuse(f"torch's own attention, since {reason}")
        o = theirs(*args, **keywords)
        _warn(reason)
        return o
    return fused_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _warn(reason: str) -> None:
    if reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(f"clinattn: torch's own attention served, since {reason}", stacklevel=4)


# A whole program


class _Activated:
    """clinattn under aten::scaled_dot_product_attention, until removed."""

    library: Library | None
    varlen: Library | None

    def __init__(self) -> None:
        self.library = Library("aten", "IMPL")
        for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
            self.library.impl("scaled_dot_product_attention", _kernel, key)
        self.fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self.tag = torch.compiler.config.cache_key_tag
        torch.compiler.config.cache_key_tag = f"{self.tag}{_NAME}"
        nested.serve(self, nested.Reach(lambda: True, lambda: self.fastpath))
        self.undo = nested.replace_jagged_attention(_attention)
        self.varlen = varlen.replace_ops()
        _forget()

    def remove(self) -> None:
        self.library = None
        torch.backends.mha.set_fastpath_enabled(self.fastpath)
        torch.compiler.config.cache_key_tag = self.tag
        nested.stop(self)
        self.undo()
        self.varlen = None
        _forget()


def _forget() -> None:
    """Drops dispatch caches and compiled code, which hold the attention in force when made."""
    vars(_OP).get("_dispatch_cache", {}).clear()  # that of calls from Python, as in tracing
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _kernel(*args: Any, **kwargs: Any) -> Tensor:
    theirs = _OP.decompose
    if torch._C._are_functorch_transforms_active():  # below them, where no Function can run
        return theirs(*args, **kwargs)
    return _attention(theirs, *args, **kwargs)


def register() -> None:
    """Add "clinattn" to torch's registry of flash attention implementations.

    activate_flash_attention_impl("clinattn") of torch.nn.attention then makes all attention of the
    process that of clinattn, in every thread, and restore_flash_attention_impl() undoes it. Both
    drop what torch.compile has compiled.

    Raises RuntimeError if this torch has no such registry.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise RuntimeError(
            f"register: torch {torch.__version__} has no registry of flash attention "
            "implementations, expected 2.11 or later; `with sdpa():` needs none"
        ) from error
    register_flash_attention_impl(_NAME, register_fn=_Activated)


# A block


def sdpa() -> AbstractContextManager[Any]:
    """A block in which this thread's F.scaled_dot_product_attention is clinattn's.

    So is nn.MultiheadAttention's with need_weights=False. Blocks may be nested, and stand within
    compiled functions or around them, which are compiled anew then. Other threads, and attention
    called as torch.ops.aten, are not reached.
    """
    return _Block()


class _Block(TorchFunctionMode):
    def __enter__(self) -> Any:
        if not torch.compiler.is_compiling():
            nested.serve(self, nested.Reach(self._is_entered, _FASTPATH))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not (torch.compiler.is_compiling() or self._is_entered()):
            nested.stop(self)

    def _is_entered(self) -> bool:
        """True in the thread that entered the block, until it leaves."""
        return any(x is self for x in _get_current_function_mode_stack())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _multi_head(*args, **kwargs)
        if isinstance(func, OpOverloadPacket):
            func = varlen.replacement(func, *args) or func
        return func(*args, **kwargs)


def _multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """F.multi_head_attention_forward, inside which no mode sees the call of attention."""
    reason = _limit(query, key, value)
    own_keys = static_k is None and static_v is None
    if need_weights or not own_keys or reason or not _flash_is_on():
        outputs = F.multi_head_attention_forward(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
            bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
            key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
            k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal,
        )  # fmt: skip
        if not need_weights:
            _warn(reason or "static_k or static_v was given")
        return outputs
    weights = Weights(
        num_heads,
        None if use_separate_proj_weight else in_proj_weight,
        in_proj_bias,
        (q_proj_weight, k_proj_weight, v_proj_weight),
        out_proj_weight,
        out_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
    )
    o = multi_head_attention(
        query,
        key,
        value,
        weights,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        is_causal=is_causal,
        dropout_p=dropout_p if training else 0.0,
    )
    return o, None
