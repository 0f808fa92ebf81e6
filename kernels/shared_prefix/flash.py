"""Attention to prefixes by flash-attn, where it is installed. Prefixes need no mask, which is what it is made for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from specdec.kernels.shared_prefix.prefix import PrefixLevel

_MAX_WIDTH = 256


@cache
def has_flash_attn() -> bool:
    """Whether flash-attn can be imported; it is not imported for that."""
    return find_spec("flash_attn") is not None


def serves(query: Tensor, level: PrefixLevel) -> bool:
    """Whether flash-attn attends to this level: plain 16-bit storage, on a GPU of compute capability 8 or later."""
    width = query.shape[-1]
    plain = level.storage.block_table is None and level.storage.key_scales is None
    fits = plain and level.values.shape[-1] == width <= _MAX_WIDTH and width % 8 == 0
    if not (fits and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and has_flash_attn()):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend(query: Tensor, level: PrefixLevel, scale: float, softcap: float | None, out: Tensor, lse: Tensor) -> None:
    """Attend to the prefixes of one level.

    Args:
        query: ``[B, H, n, d]``.
        level: the prefixes.
        scale: factor on the scores.
        softcap: as for tree attention.
        out: ``[B, H, n, d]``, written where a row has a prefix.
        lse: ``[B, H, n]`` float32, the same; natural logarithm, -inf for a prefix of no keys.
    """
    from flash_attn import flash_attn_with_kvcache

    _, num_heads, num_nodes, width = query.shape
    for prefixes, first, end in _calls(level):
        keys, values = (t[prefixes].transpose(1, 2) for t in (level.keys, level.values))  # [P, S, H_kv, d]
        together = query[first:end].transpose(1, 2).reshape(len(keys), -1, num_heads, width)  # [P, R * n, H, d]
        part, part_lse = flash_attn_with_kvcache(
            together, keys, values, cache_seqlens=level.lengths32[prefixes], softmax_scale=scale, causal=False,
            softcap=softcap or 0.0, return_softmax_lse=True,
        )  # fmt: skip
        out[first:end] = part.reshape(end - first, num_nodes, num_heads, width).transpose(1, 2)
        part_lse = part_lse.reshape(len(keys), num_heads, -1, num_nodes).transpose(1, 2).flatten(0, 1)
        lse[first:end] = part_lse.masked_fill(part_lse == torch.inf, -torch.inf)  # its mark of an empty row is +inf


def _calls(level: PrefixLevel) -> Iterator[tuple[slice, int, int]]:
    """Prefixes of one call, and its rows: all at once where ranges are neighbours of equal size."""
    ranges = level.ranges
    sizes = {end - first for first, end in ranges}
    if len(sizes) == 1 and sizes != {0} and all(one[1] == other[0] for one, other in pairwise(ranges)):
        yield slice(0, len(ranges)), ranges[0][0], ranges[-1][1]
        return
    for index, (first, end) in enumerate(ranges):
        if first < end:
            yield slice(index, index + 1), first, end
