"""Encoder throughput on clinical sequences: torch SDPA padded and bucketed, ours padded, packed.

Others import settings (what to run), run (the Benchmark), agreement (Disagreement), variants and
workload to time encoders by themselves, and measure (quartiles, peak memory).
"""
