"""Exact attention for clinical models: one operator, one meaning, on CPU and GPU."""

from importlib.metadata import PackageNotFoundError, version

from clinattn.backends.select import backends
from clinattn.explain import attribute, explain
from clinattn.integrations.replace import replace_attention
from clinattn.operator import ranges
from clinattn.operator.attention import fused_attention, fused_attention_varlen
from clinattn.operator.functions import FusedAttention
from clinattn.operator.relative import t5_relative_bias
from clinattn.operator.rotary import rotary
from clinattn.operator.summary import attention_summary
from clinattn.parallel import context_parallel

try:
    __version__ = version("clinattn")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0"

__all__ = [
    "FusedAttention",
    "attention_summary",
    "attribute",
    "backends",
    "context_parallel",
    "explain",
    "fused_attention",
    "fused_attention_varlen",
    "ranges",
    "replace_attention",
    "rotary",
    "t5_relative_bias",
]
