"""Fresh memory is full of NaN, so that an element that nothing wrote shows.

By M_PERTURB of glibc's mallopt(3); elsewhere memory is what it is.
"""

import ctypes

M_PERTURB = -6
ALL_ONES = 0x100  # malloc fills with the complement of the lowest byte: NaN in every floating type


def fill_with_nan() -> bool:
    """Fills all memory that this process allocates from now on; returns whether libc can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_PERTURB, ALL_ONES) == 1
