"""Memory in large pages, for weights that every pass reads from beginning to end.

A processor looks up where a page lies before it reads it. Of pages of 4 KB a pass over a model of 270 MB has 66,000 to
look up, each a walk through tables in memory, under a hypervisor through two; of pages of 2 MB it has 130. Linux gives
large pages where they are asked for (``madvise``), and small ones where it has none.
"""

from __future__ import annotations

import math
import mmap
import weakref
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

PAGE = 2 << 20
"""Bytes of a large page, as x86 and most of arm64 have them."""

CHUNK = 64 << 20
"""Bytes that are asked for at a time: tensors that belong together share pages."""

LEAST = 128 << 10
"""Bytes of a tensor that is worth it."""

_ALIGNMENT = 64


class Pages:
    """Hands out tensors in chunks of large pages; a chunk is freed with the last of its tensors."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._lock = Lock()
        self._open: weakref.ref[mmap.mmap] | None = None  # the chunk that has room
        self._at = self._end = 0  # its next byte, and the one behind its last

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, beginning at a multiple of 64 bytes; it takes memory where it is first written.

        Small ones, and all where the system knows no such advice, are PyTorch's own.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(shape, dtype=dtype)
        with self._lock:
            chunk = None if self._open is None or self._at + size > self._end else self._open()
            if chunk is None:
                chunk = self._new_chunk(size)
            start, self._at = self._at, -(-(self._at + size) // _ALIGNMENT) * _ALIGNMENT
        # Nobody had this memory before, so it is zero.
        return torch.frombuffer(chunk, dtype=dtype, count=count, offset=start).view(shape)

    def _new_chunk(self, size: int) -> mmap.mmap:
        """Memory for ``size`` bytes at least; its first whole page is where ``_at`` stands."""
        length = -(-max(size, self._chunk) // PAGE) * PAGE
        chunk = mmap.mmap(-1, length + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages
            chunk.madvise(mmap.MADV_HUGEPAGE)
        self._at = -torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr() % PAGE
        self._end = self._at + length
        self._open = weakref.ref(chunk)
        return chunk


WEIGHTS = Pages()
"""Where packed weights lie."""
