"""How the process of a server or a command keeps its memory. Nothing about what lies in it.

Encoding an image takes and frees maps of many megabytes. The C library gives such pieces back to the system at once and
gets them anew, page by page and zeroed, for the next map: a third of the time of an encode at T = 1024 goes there.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of <malloc.h>
_PIECE = 256 << 20  # larger ones are still given back at once
_KEPT = 1 << 30  # of free memory at the end of the heap


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for the next image, in one heap for all its threads; whether that works here.

    For programs that own their process, before their threads begin. It does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) for option in ((_MMAP, _PIECE), (_TRIM, _KEPT), (_ARENAS, 1)))
