"""Triton attention kernels, installed as `clinattn.kernels`. Importing this imports nothing."""

# A folder called kernels can be mistaken for the Hub client of that name, whose users read this.
__version__ = "0"
