"""The functions of flash-attn 2.8, with its names and arguments, on every device and dtype.

    from clinattn.integrations.flash_attn import flash_attn_func

or, for code that imports flash_attn by name, clinattn.integrations.flash_attn.install(). torch's
varlen_attn, which has flash-attn's semantics, imports words and used.
"""

from clinattn.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from clinattn.integrations.flash_attn.install import install, uninstall

__version__ = "2.8.4"  # of flash-attn, whose interface this is

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
