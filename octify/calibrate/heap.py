"""Freed memory kept for the next tensor while a calibration runs.

The C library gives large blocks back to the system as soon as they are freed, and zeroed pages come back with the next
one: with maps of some megabytes that takes as long as the convolutions (measured on EfficientNet-B0: 1.6 of 2.6 s a
pass).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's numbers
KEPT = (1 << 31) - 1  # bytes: as good as never given back
USUAL = 32 << 20  # what the C library comes to by itself where large blocks are freed


@contextmanager
def kept_memory() -> Generator[None]:
    """Keeps freed memory in the process, and gives it back at the end; does nothing where there is no GNU C library."""
    library = _library()
    if library is None:
        yield
        return
    library.mallopt(MMAP_THRESHOLD, KEPT)
    library.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, USUAL)
        library.mallopt(TRIM_THRESHOLD, 2 * USUAL)
        library.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
