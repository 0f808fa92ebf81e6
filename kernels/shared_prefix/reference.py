"""Attention with shared prefixes written out: each row attends to its prefixes and its own keys as one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.shared_prefix.prefix import PrefixLevel
from specdec.kernels.tree_attention import KVFormat, TreeMask
from specdec.kernels.tree_attention import reference as tree_reference
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
    """See ``specdec.kernels.shared_prefix.shared_prefix_with_lse``."""
    compute = torch.promote_types(query.dtype, torch.float32)
    own_keys, own_values = storage.dense(keys, values, compute)
    own_visible = mask.dense(own_keys.shape[2])
    rows = []
    for b in range(len(query)):
        row_keys, row_values, visible = [], [], []
        for level in levels:
            for index, (first, end) in enumerate(level.ranges):
                if first <= b < end:
                    prefix_keys, prefix_values, length, form = level.one(index)
                    prefix_keys, prefix_values = form.dense(prefix_keys, prefix_values, compute)
                    row_keys.append(prefix_keys[:, :, : int(length)])
                    row_values.append(prefix_values[:, :, : int(length)])
                    visible.append(own_visible.new_ones(1, query.shape[2], row_keys[-1].shape[2]))
        row_keys.append(own_keys[b : b + 1])
        row_values.append(own_values[b : b + 1])
        visible.append(own_visible[b : b + 1])
        rows.append(
            tree_reference.tree_attention_with_lse(
                query[b : b + 1], torch.cat(row_keys, 2), torch.cat(row_values, 2), torch.cat(visible, 2), scale,
                softcap, sinks,
            )
        )  # fmt: skip
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
