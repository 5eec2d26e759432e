"""Triton attention kernels, installed as `clinattn.kernels`. Importing this imports nothing."""

# The Hub client has the same name, `kernels`; its users read __version__ of what they import.
__version__ = "0"
