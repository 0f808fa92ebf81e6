"""The compiled corpus: one call takes in the new tokens of all texts in flight and grows their trees."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from specdec.kernels.build import find_library
from specdec.kernels.suffix.corpus import Asked
from specdec.tree import TokenTree

_LARGEST = 1 << 48
"""What limits are passed as at most: more than any memory holds, and twice that fits 64 bits."""


class _Text:
    """A text in flight, at an address; what is there is freed with this."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.address: int | None = library.suffix_begin()
        _check(self.address is not None)
        weakref.finalize(self, library.suffix_end, self.address)


class CompiledCorpus:
    """See ``SuffixCorpus`` and ``make_corpus``. Methods raise MemoryError where there is none left."""

    def __init__(
        self,
        library: ctypes.CDLL,
        max_nodes: int,
        nodes_per_match: float,
        min_probability: float,
        corpus_tokens: int,
    ) -> None:
        self._library = library
        self._address: int | None = library.suffix_new(
            min(max_nodes, _LARGEST), nodes_per_match, min_probability, min(corpus_tokens, _LARGEST)
        )
        _check(self._address is not None)
        weakref.finalize(self, library.suffix_free, self._address)

    def begin(self) -> _Text:
        return _Text(self._library)

    def draft(self, asked: Sequence[Asked]) -> TokenTree:
        numbers: list[int] = []
        for text, new, depth in asked:
            numbers += (text.address, depth, len(new), *new)
        read = array("q", numbers)
        width = self._library.suffix_draft(self._address, read.buffer_info()[0], len(asked))
        _check(width >= 0)
        tokens = torch.empty(len(asked), width, dtype=torch.int64)
        parents = torch.empty(len(asked), width, dtype=torch.int64)
        confidence = torch.empty(len(asked), width, dtype=torch.float32)
        self._library.suffix_read(self._address, width, tokens.data_ptr(), parents.data_ptr(), confidence.data_ptr())
        return TokenTree(tokens, parents, confidence=confidence)

    def remember(self, tokens: Sequence[int]) -> None:
        read = array("q", tokens)
        _check(self._library.suffix_remember(self._address, read.buffer_info()[0], len(tokens)))


def _check(done: bool) -> None:
    if not done:
        raise MemoryError("no memory for suffix automata")


@cache
def compiled() -> ctypes.CDLL | None:
    """The library; None where it cannot be built."""
    library = find_library(Path(__file__).with_name("cpu.c"))
    if library is None:
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.suffix_new.argtypes, library.suffix_new.restype = (number, real, real, number), pointer
    library.suffix_free.argtypes, library.suffix_free.restype = (pointer,), None
    library.suffix_begin.argtypes, library.suffix_begin.restype = (), pointer
    library.suffix_end.argtypes, library.suffix_end.restype = (pointer,), None
    library.suffix_draft.argtypes, library.suffix_draft.restype = (pointer, pointer, number), number
    library.suffix_read.argtypes, library.suffix_read.restype = (pointer, number, *[pointer] * 3), None
    library.suffix_remember.argtypes, library.suffix_remember.restype = (pointer, pointer, number), ctypes.c_int
    return library
