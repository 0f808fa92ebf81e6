"""Acceptance on the CPU: only nodes on the path are looked at, and each position's noise is made once."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from specdec.kernels.accept.acceptance import Acceptance
from specdec.kernels.build import NotBuilt, load_library
from specdec.sampling import keyed_gumbel

_COMPILED = {torch.bfloat16: 2, torch.float32: 4}
"""Types whose rows the compiled search reads, and their sizes."""


def accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None = None, temperature: float = 1.0
) -> Acceptance:
    """See ``specdec.kernels.accept.accept``."""
    _, num_nodes, vocab_size = logits.shape
    index = torch.arange(vocab_size)
    row_keys = None if keys is None else keys.tolist()
    rows = []
    for b, (drafted, above) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        children: dict[tuple[int, int], int] = {}
        for column in range(1, num_nodes):
            if above[column] >= 0:
                children.setdefault((above[column], drafted[column]), column)
        path = [0]
        while True:
            scores = logits[b, path[-1]]
            if row_keys is not None:
                scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
                scores = scores + keyed_gumbel(row_keys[b][len(path) - 1] & (1 << 64) - 1, index)
            bonus = find_best(scores)
            failed = bonus < 0
            child = children.get((path[-1], bonus))
            if child is None:
                rows.append((path, bonus, failed))
                break
            path.append(child)
    return Acceptance.from_rows(rows, num_nodes, logits.device)


def find_best(scores: Tensor) -> int:
    """Index of the first of the largest of ``[V]`` numbers; -1 where one is NaN."""
    search = _compiled()
    if search is not None and scores.dtype in _COMPILED and scores.is_contiguous():
        return search(scores.data_ptr(), len(scores), _COMPILED[scores.dtype])
    best, index = scores.max(-1)  # NaN is the largest of all
    return -1 if math.isnan(float(best)) else int(index)


@cache
def _compiled() -> Callable[[int, int, int], int] | None:
    """The search as one pass over the row, which PyTorch's takes three for; None where it cannot be compiled."""
    try:
        found = load_library(Path(__file__).with_name("cpu.c")).find_best
    except NotBuilt:
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int), ctypes.c_long
    search: Callable[[int, int, int], int] = found
    return search
