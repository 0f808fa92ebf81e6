"""Trees of several drafters as one per row, compiled: nodes are merged, scored and chosen, and learnt from."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.build import find_library

MOST_PARTS = 4
"""Drafters that may be merged here: who agrees with whom is kept for every pair of sets of them."""

MOST_CHOICES = 64
"""Choices from one draft's trees, the first of roots alone."""

COMPILE = ("-ffp-contract=off",)
"""No product is fused with a sum: numbers are Python's to the bit."""


def serves(num_parts: int) -> bool:
    """Whether trees of so many drafters are merged here: there is a compiler, and they are not too many."""
    return num_parts <= MOST_PARTS and _compiled() is not None


def new_calibration(num_parts: int) -> array[float]:
    """What is learnt of so many drafters: nothing yet."""
    return array("d", bytes(8 * _library().merge_size(num_parts)))


def new_row(num_parts: int) -> array[float]:
    """What is learnt of them in one text: nothing yet."""
    return array("d", bytes(8 * 4 * num_parts))


class CompiledTrees:
    """One tree per row, of a root before anything is added: a ``MergedTrees`` of ``specdec.drafters.hybrid_merger``.

    Args:
        pending: the roots' tokens.
        max_depth: of each row, depth below which nodes are left out.
        calibration: ``new_calibration``'s, what chances are corrected by; learns.
        rows: of each row ``new_row``'s, how drafters do in this text; learn.
    """

    def __init__(
        self, pending: Sequence[int], max_depth: Sequence[int], calibration: array[float], rows: Sequence[array[float]]
    ) -> None:
        self.sizes, self.expected = [[1] * len(pending)], [[0.0] * len(pending)]
        self._library, self._trees = _library(), None
        self._learns = calibration, rows  # C writes there
        held: tuple[array[Any], ...] = _ints(pending), _ints(max_depth), calibration, _ints(map(_address, rows))
        self._trees = self._library.merge_new(len(pending), len(rows[0]) // 4, *map(_address, held))
        if self._trees is None:
            raise MemoryError("no memory for merged trees")

    def __del__(self) -> None:
        if self._trees is not None:
            self._library.merge_free(self._trees)

    def add(self, part: int, tokens: Tensor, parents: Tensor, confidence: Tensor | None) -> None:
        tokens, parents = tokens.cpu().contiguous(), parents.cpu().contiguous()
        chances = None if confidence is None else confidence.cpu().float().contiguous()
        rows, columns = tokens.shape
        pointers = [None if each is None else each.data_ptr() for each in (tokens, parents, chances)]
        alike = rows == len(self.sizes[-1])
        found = self._library.merge_add(self._trees, part, *pointers, columns) if alike else 0
        if found < 0:
            raise MemoryError("no memory for merged trees")
        if not found:
            raise ValueError("there must be one tree per row, rooted at its pending token")

    def choose(
        self, max_nodes: int, least: float, most: int, worth: Callable[[Sequence[float]], int] | None = None
    ) -> None:
        assert len(self.sizes) < MOST_CHOICES
        rows = len(self.sizes[-1])
        most = min(most, rows * (max_nodes - 1))
        chances = array("d", bytes(8 * most))
        found = self._library.merge_rank(self._trees, max_nodes, least, most, _address(chances))
        if found < 0:
            raise MemoryError("no memory for merged trees")
        count = most if worth is None else worth(chances[:found].tolist())
        sizes, expected = array("q", bytes(8 * rows)), array("d", bytes(8 * rows))
        self._library.merge_choose(self._trees, count, _address(sizes), _address(expected))
        self.sizes.append(sizes.tolist())
        self.expected.append(expected.tolist())

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = len(self.sizes[-1]), max(self.sizes[-1])
        tokens, parents = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
        confidence = torch.empty(shape, dtype=torch.float32)
        pointers = (each.data_ptr() for each in (tokens, parents, confidence))
        self._library.merge_columns(self._trees, shape[1], *pointers)
        return tokens, parents, confidence

    def learn(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        rows, choices = len(self.sizes[-1]), len(self.sizes)
        accepted = array("q", bytes(8 * rows * choices))
        flat, lengths = _ints(chain.from_iterable(tokens)), _ints(map(len, tokens))
        self._library.merge_learn(self._trees, *map(_address, (flat, lengths, accepted)))
        return [accepted[choice * rows : (choice + 1) * rows].tolist() for choice in range(choices)]

    def keep(self, rows: Sequence[int]) -> None:
        kept = _ints(rows)
        if not self._library.merge_keep(self._trees, _address(kept), len(kept)):
            raise MemoryError("no memory for merged trees")
        self.sizes = [[sizes[row] for row in rows] for sizes in self.sizes]
        self.expected = [[expected[row] for row in rows] for expected in self.expected]


def _ints(values: Iterable[int]) -> array[int]:
    return array("q", values)


def _address(values: array[Any]) -> int:
    """Good as long as the array is referred to elsewhere."""
    return values.buffer_info()[0]


def _library() -> ctypes.CDLL:
    library = _compiled()
    assert library is not None, "asked only where it serves"
    return library


@cache
def _compiled() -> ctypes.CDLL | None:
    library = find_library(Path(__file__).with_name("cpu.c"), COMPILE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "merge_size": (number, (number,)),
        "merge_new": (pointer, (number, number, *[pointer] * 4)),
        "merge_free": (None, (pointer,)),
        "merge_add": (ctypes.c_int, (pointer, ctypes.c_int, pointer, pointer, pointer, number)),
        "merge_rank": (number, (pointer, number, ctypes.c_double, number, pointer)),
        "merge_choose": (None, (pointer, number, pointer, pointer)),
        "merge_columns": (None, (pointer, number, pointer, pointer, pointer)),
        "merge_learn": (None, (pointer, pointer, pointer, pointer)),
        "merge_keep": (ctypes.c_int, (pointer, pointer, number)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
