"""Acceptance on the CPU: only nodes on the path are looked at, and each position's noise is made once."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from specdec.kernels.accept.acceptance import NUM_FIELDS, Acceptance
from specdec.kernels.build import find_library
from specdec.sampling import keyed_gumbel

_COMPILED = {torch.bfloat16: 2, torch.float32: 4}
"""Types whose rows the compiled search reads, and their sizes."""


class _Walk(ctypes.Structure):
    """``walk_arguments``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "tokens", "parents", "keys", "packed")),
        *((name, ctypes.c_long) for name in ("rows", "nodes", "width", "levels")),
        ("bytes", ctypes.c_int),
        ("temperature", ctypes.c_float),
    ]


def accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None = None, temperature: float = 1.0
) -> Acceptance:
    """See ``specdec.kernels.accept.accept``."""
    library = _compiled()
    if library is None or logits.dtype not in _COMPILED or not logits.is_contiguous():
        return _accept_in_lists(logits, tokens, parents, keys, temperature)
    rows, nodes, width = logits.shape
    packed = torch.empty(rows, NUM_FIELDS + nodes, dtype=torch.int64)
    tokens, parents = tokens.contiguous(), parents.contiguous()
    keys = None if keys is None else keys.contiguous()
    library.walk(
        _Walk(
            logits.data_ptr(), tokens.data_ptr(), parents.data_ptr(), None if keys is None else keys.data_ptr(),
            packed.data_ptr(), rows, nodes, width, 0 if keys is None else keys.shape[1], _COMPILED[logits.dtype],
            temperature,
        )
    )  # fmt: skip
    return Acceptance(packed)


def _accept_in_lists(
    logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None, temperature: float
) -> Acceptance:
    rows = []
    for b, (drafted, above) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        children: dict[tuple[int, int], int] = {}
        for column in range(1, len(drafted)):
            if above[column] >= 0:
                children.setdefault((above[column], drafted[column]), column)
        path = [0]
        while True:
            scores = logits[b, path[-1]]
            if keys is None:
                bonus = find_best(scores)
            else:
                bonus = draw_best(scores, int(keys[b, len(path) - 1]), temperature)
            failed = bonus < 0
            child = children.get((path[-1], bonus))
            if child is None:
                rows.append((path, bonus, failed))
                break
            path.append(child)
    return Acceptance.from_rows(rows, logits.shape[1], logits.device)


def find_best(scores: Tensor) -> int:
    """Index of the first of the largest of ``[V]`` numbers; -1 where one is NaN."""
    library = _compiled()
    if library is not None and scores.dtype in _COMPILED and scores.is_contiguous():
        return int(library.find_best(scores.data_ptr(), len(scores), _COMPILED[scores.dtype]))
    best, index = scores.max(-1)  # NaN is the largest of all
    return -1 if math.isnan(float(best)) else int(index)


def draw_best(scores: Tensor, key: int, temperature: float) -> int:
    """The same of ``scores / temperature + keyed_gumbel(key)``; the key in 64 bits, signed or not."""
    key &= (1 << 64) - 1
    library = _compiled()
    if library is not None and scores.dtype in _COMPILED and scores.is_contiguous():
        return int(library.draw_best(scores.data_ptr(), len(scores), _COMPILED[scores.dtype], key, temperature))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
    return find_best(scores + keyed_gumbel(key, torch.arange(len(scores), device=scores.device)))


@cache
def _compiled() -> ctypes.CDLL | None:
    """The searches in one read of a row, where PyTorch takes three or thirty; None where they cannot be compiled."""
    library = find_library(Path(__file__).with_name("cpu.c"))
    if library is None:
        return None
    row = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    library.find_best.argtypes, library.find_best.restype = row, ctypes.c_long
    library.draw_best.argtypes = (*row, ctypes.c_uint64, ctypes.c_float)
    library.draw_best.restype = ctypes.c_long
    library.walk.argtypes, library.walk.restype = (ctypes.POINTER(_Walk),), None
    return library
