"""The operator: exact attention, its derivatives and summaries, rotary positions, and packing.

Others import attention and summary (the public functions), functions (FusedAttention), rotary,
relative, packing, jagged (nested tensors), visibility (masks and windows), ranges (names in a
profile), listeners (to calls), split (of sequences over processes), bare, autograd, ops, assemble,
timeline, and the checks of arguments in words/.
"""
