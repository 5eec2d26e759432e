"""Attention in code that exists: transformers, torch.nn, torch's own SDPA, flash-attn, xformers.

Others import replace (replace_attention), and users transformers, trainer (packed batches for those
that exist), sdpa, flash_attn and xformers.
Nothing here is imported before it is asked for, and no package is needed but the one it serves.
"""
