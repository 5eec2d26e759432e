"""What a caller may say: scalars, checks of tensors, and the arguments that are turned into others.

Others import checks and scalars; feature_checks and features serve attention and flash_attn.
"""
