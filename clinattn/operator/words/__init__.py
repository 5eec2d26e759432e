"""Arguments of a call: scalars, checks of tensors, and arguments that are turned into others.

Others import checks, forms and scalars; feature_checks and features serve attention and flash_attn.
"""
