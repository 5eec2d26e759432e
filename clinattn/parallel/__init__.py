"""A sequence over several processes: exact attention of which each process has some tokens.

Others import context_parallel, gather and shard. context.py: the block; calls.py: the public
functions inside it; documents.py, times.py and plan.py: which keys a process needs; keys.py and
processes.py: their way; attention.py: both passes; prefix.py, prefix_attention.py: global prefixes.
"""

from clinattn.parallel.context import context_parallel, gather, shard

__all__ = ["context_parallel", "gather", "shard"]
