"""How a process that moves files holds its memory."""

import ctypes
import sys

TRIM, MMAP = -1, -3  # mallopt's names of what is set, malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
PIECE_BYTES, KEPT_BYTES = 32 << 20, 64 << 20  # the former is the most that glibc takes


def keep_freed() -> bool:
    """Have the C library keep what is freed for what comes next; return whether it does, as only glibc can.

    It would give each piece of a file back to the system, which fills the next one's pages with zeros before it hands
    them out: that takes longer than to send the piece.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(MMAP, PIECE_BYTES)) and bool(mallopt(TRIM, KEPT_BYTES))
