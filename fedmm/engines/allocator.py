"""Keep freed memory in the process: training allocates and frees the same buffers at every step.

glibc hands blocks of this size back to the system at once and faults them in again page by page, which costs a fifth
of a round of small models.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 2**20  # the most that glibc takes
_KEPT_AT_MOST = 512 * 2**20


@lru_cache(maxsize=1)
def keep_memory() -> bool:
    """Tell glibc once; whether it listened (other C libraries have no such switch)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_MOST))
