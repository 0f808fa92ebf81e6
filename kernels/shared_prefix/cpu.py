"""Attention with shared prefixes on the CPU: PyTorch's fused kernel on each prefix once, for all rows behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.shared_prefix.prefix import PrefixLevel
from specdec.kernels.tree_attention import KVFormat, TreeMask
from specdec.kernels.tree_attention import cpu as tree_cpu
from specdec.kernels.tree_attention.combine import apply_sinks, combine
from specdec.kernels.tree_attention.storage import PLAIN


def shared_prefix_with_lse(
    query: Tensor,
    levels: Sequence[PrefixLevel],
    keys: Tensor,
    values: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    storage: KVFormat = PLAIN,
) -> tuple[Tensor, Tensor]:
    """See ``specdec.kernels.shared_prefix.shared_prefix_with_lse``.

    As in tree attention on the CPU, own slots that are not seen must hold finite numbers up to the longest row's end.
    """
    parts = [_level(query, level, scale, softcap) for level in levels]
    parts.append(tree_cpu.tree_attention_with_lse(query, keys, values, mask, scale, softcap, None, storage))
    out, lse = combine(parts, query.dtype)
    return (out if sinks is None else apply_sinks(out, lse, sinks)), lse


def _level(query: Tensor, level: PrefixLevel, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the prefixes of one level; 0 and -inf for rows without one."""
    _, num_heads, num_nodes, width = query.shape
    out = query.new_zeros((*query.shape[:3], level.values.shape[-1]))
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    for index, (first, end) in enumerate(level.ranges):
        count = end - first
        if count == 0:
            continue
        keys, values, length, storage = level.one(index)
        together = query[first:end].transpose(0, 1).reshape(1, num_heads, count * num_nodes, width)
        nobody = torch.zeros(1, count * num_nodes, 0, dtype=torch.bool)  # no tree: all see the whole prefix
        mask = TreeMask(length, nobody, torch.zeros(1, 0, dtype=torch.int64))
        part, part_lse = tree_cpu.tree_attention_with_lse(together, keys, values, mask, scale, softcap, None, storage)
        out[first:end] = part.view(num_heads, count, num_nodes, -1).transpose(0, 1)
        lse[first:end] = part_lse.view(num_heads, count, num_nodes).transpose(0, 1)
    return out, lse
