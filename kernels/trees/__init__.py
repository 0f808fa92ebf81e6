"""Ancestors and depths of tree nodes, whether they make a tree, and which of them are the most promising."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from specdec.kernels.build import find_library

_PADDING = -2
"""The parent of padding, as in cpu.c."""

MOST_COMPILED = 4096
"""Nodes of all rows up to which walking the columns one by one is worth it on the CPU."""


def tree_shape(parents: Tensor) -> tuple[Tensor, Tensor]:
    """What a tree's parents say.

    Args:
        parents: ``[B, N]`` int64, an earlier column for every node that has one, below 0 for others.

    Returns:
        ``[B, N, N]`` bool, set at ``[b, i, j]`` where j is i or an ancestor of i; ``[B, N]`` int64, edges above a node.
    """
    library = _compiled_for(parents)
    if library is None:
        return by_products(parents)
    rows, nodes = parents.shape
    parents = parents.contiguous()
    ancestors = torch.empty(rows, nodes, nodes, dtype=torch.bool)
    depth = torch.empty(rows, nodes, dtype=torch.int64)
    library.tree_shape(parents.data_ptr(), rows, nodes, ancestors.data_ptr(), depth.data_ptr())
    return ancestors, depth


def is_tree(tokens: Tensor, parents: Tensor, vocab_size: int) -> bool:
    """Whether a compiled look finds that each row is a tree of tokens of a vocabulary; False also where there is none.

    Args:
        tokens: ``[B, N]`` int64.
        parents: ``[B, N]`` int64 as ``TokenTree`` has them.
        vocab_size: tokens are below it.
    """
    library = _compiled_for(parents)
    if library is None:
        return False
    tokens, parents = tokens.contiguous(), parents.contiguous()
    return bool(library.is_tree(tokens.data_ptr(), parents.data_ptr(), *parents.shape, vocab_size))


def count_drafts(parents: Tensor, depth: Tensor) -> list[list[int]]:
    """Of each row: nodes below the root, and the depth of the deepest.

    Args:
        parents: ``[B, N]`` int64, an earlier column for every node below a root, below 0 for others.
        depth: ``[B, N]`` int64 of ``tree_shape``.
    """
    library = _compiled_for(parents)
    if library is None:
        below = parents >= 0
        counts = torch.stack([below.sum(1), (depth * below).amax(1)], dim=1)
    else:
        counts = torch.empty(len(parents), 2, dtype=torch.int64)
        parents, depth = parents.contiguous(), depth.contiguous()
        library.count_drafts(parents.data_ptr(), depth.data_ptr(), *parents.shape, counts.data_ptr())
    rows: list[list[int]] = counts.tolist()
    return rows


def standing(parents: Tensor, confidence: Tensor) -> Tensor:
    """Every node's place among those of all rows, counted per row: ``[B, N]`` int64.

    Roots come first, then other nodes by how likely the least likely one on the way to each is, of equals column by
    column, padding last; so a parent never stands behind its child.

    Args:
        parents: ``[B, N]`` int64 as ``TokenTree`` has them.
        confidence: ``[B, N]``, how likely each is; NaN counts as 0.
    """
    library, (rows, nodes) = _compiled_for(parents), parents.shape
    if library is None:
        return _standing_by_sort(parents, confidence)
    places, memory = torch.empty(rows, nodes, dtype=torch.int64), torch.empty(rows, nodes, 2, dtype=torch.int64)
    parents, confidence = parents.contiguous(), confidence.float().contiguous()
    library.standing(parents.data_ptr(), confidence.data_ptr(), rows, nodes, memory.data_ptr(), places.data_ptr())
    return places


def _standing_by_sort(parents: Tensor, confidence: Tensor) -> Tensor:
    size, count = parents.shape
    likely = confidence.masked_fill(confidence.isnan(), 0.0).unsqueeze(1).expand(-1, count, -1)
    chance = (
        likely.masked_fill(~tree_shape(parents)[0], torch.inf).amin(-1).masked_fill(parents == _PADDING, -torch.inf)
    )
    chance[:, 0] = torch.inf
    order = chance.T.flatten().sort(descending=True, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place.view(count, size).T // size


def keep_best(
    tokens: Tensor, parents: Tensor, confidence: Tensor, places: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The nodes that stand before ``count``, each row's moved up: tokens, parents and confidence ``[B, M]``.

    None where that is not compiled.

    Args:
        tokens: ``[B, N]`` int64.
        parents: ``[B, N]`` int64 as ``TokenTree`` has them.
        confidence: ``[B, N]`` float32.
        places: ``[B, N]`` int64 of ``standing``.
        count: at least 1: roots stay.
    """
    library = _compiled_for(parents)
    if library is None or confidence.dtype != torch.float32:
        return None
    held = [each.contiguous() for each in (tokens, parents, confidence, places)]
    kept = [torch.empty_like(each) for each in held]  # the last one is memory to work in
    pointers = [each.data_ptr() for each in held]
    width = library.keep_best(*pointers, *parents.shape, count, *(each.data_ptr() for each in kept))
    tokens, parents, confidence = (each[:, :width].contiguous() for each in kept[:3])
    return tokens, parents, confidence


def by_products(parents: Tensor) -> tuple[Tensor, Tensor]:
    """The same on any device: each product of the matrix with itself doubles the generations it covers."""
    nodes = parents.shape[1]
    identity = torch.eye(nodes, device=parents.device)
    hop = torch.nn.functional.one_hot(parents.clamp(min=0), nodes).to(identity.dtype)
    reach = identity + hop * (parents >= 0).unsqueeze(-1)
    for _ in range(math.ceil(math.log2(nodes)) if nodes > 1 else 0):
        reach = (reach @ reach).clamp(max=1)
    return reach > 0, (reach > 0).sum(-1) - 1


def _compiled_for(parents: Tensor) -> ctypes.CDLL | None:
    return _compiled() if parents.device.type == "cpu" and parents.numel() <= MOST_COMPILED else None


@cache
def _compiled() -> ctypes.CDLL | None:
    library = find_library(Path(__file__).with_name("cpu.c"))
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.tree_shape.argtypes, library.tree_shape.restype = (pointer, number, number, pointer, pointer), None
    library.is_tree.argtypes, library.is_tree.restype = (pointer, pointer, number, number, ctypes.c_int64), ctypes.c_int
    library.count_drafts.argtypes, library.count_drafts.restype = (pointer, pointer, number, number, pointer), None
    library.standing.argtypes, library.standing.restype = (pointer, pointer, number, number, pointer, pointer), None
    library.keep_best.argtypes = (*[pointer] * 4, *[number] * 3, *[pointer] * 4)
    library.keep_best.restype = number
    return library
