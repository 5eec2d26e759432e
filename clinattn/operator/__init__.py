"""The operator: exact attention, its derivatives, rotary positions, and packing.

Others import attention (the public functions), functions (FusedAttention), rotary, relative,
packing, jagged (nested tensors), visibility (masks and windows), ranges (names in a profile),
autograd and ops, and the checks of arguments in words/.
"""
