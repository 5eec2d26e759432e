"""A sequence over several processes: exact attention of which each process has some tokens.

Others import context (context_parallel).
"""

from clinattn.parallel.context import context_parallel, gather, shard

__all__ = ["context_parallel", "gather", "shard"]
