"""Encoder throughput on clinical sequences: torch SDPA padded and bucketed, ours padded, packed."""

from .agreement import Disagreement
from .environment import environment
from .run import DTYPES, Benchmark, Settings
from .variants import MODES, VARIANTS

__all__ = ["DTYPES", "MODES", "VARIANTS", "Benchmark", "Disagreement", "Settings", "environment"]
