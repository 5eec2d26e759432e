"""Attention in code that exists: transformers, torch.nn, torch's own SDPA, flash-attn, xformers.

Nothing here is imported before it is asked for, and no package is needed but the one it serves.
"""
