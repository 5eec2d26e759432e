"""The names of xformers.ops.fmha."""

from clinattn.integrations.xformers import attn_bias
from clinattn.integrations.xformers.attention import (
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from clinattn.integrations.xformers.attn_bias import (
    AttentionBias,
    BlockDiagonalMask,
    LowerTriangularMask,
)
from clinattn.integrations.xformers.partial import (
    memory_efficient_attention_partial,
    merge_attentions,
)

# Choices of xformers' kernels, which the argument `op` takes and here nothing reads.
ANY_KERNELS = (None, None)
MemoryEfficientAttentionCkOp = ANY_KERNELS
MemoryEfficientAttentionCutlassBlackwellOp = ANY_KERNELS
MemoryEfficientAttentionCutlassFwdFlashBwOp = ANY_KERNELS
MemoryEfficientAttentionCutlassOp = ANY_KERNELS
MemoryEfficientAttentionFlashAttentionOp = ANY_KERNELS
MemoryEfficientAttentionSplitKCkOp = ANY_KERNELS

__all__ = [
    "AttentionBias",
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "MemoryEfficientAttentionCkOp",
    "MemoryEfficientAttentionCutlassBlackwellOp",
    "MemoryEfficientAttentionCutlassFwdFlashBwOp",
    "MemoryEfficientAttentionCutlassOp",
    "MemoryEfficientAttentionFlashAttentionOp",
    "MemoryEfficientAttentionSplitKCkOp",
    "attn_bias",
    "memory_efficient_attention",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
    "merge_attentions",
]
