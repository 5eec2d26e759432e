"""Encoder throughput on clinical sequences: torch SDPA padded and bucketed, ours padded, packed.

Others import the names below, run, variants and workload to time encoders by themselves, and
measure (quartiles, peak memory).
"""

from clinattn.tools.environment import environment

from .agreement import Disagreement
from .run import DTYPES, Benchmark, Settings
from .variants import MODES, VARIANTS

__all__ = ["DTYPES", "MODES", "VARIANTS", "Benchmark", "Disagreement", "Settings", "environment"]
