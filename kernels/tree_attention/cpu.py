"""Tree attention through PyTorch's fused kernel, the query heads of a KV head packed into rows."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """See ``specdec.kernels.tree_attention.tree_attention``; without soft-cap and sinks."""
    batch_size, num_heads, num_nodes, width = query.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    packed = query.reshape(batch_size, num_kv_heads, group * num_nodes, width)
    rows = mask.unsqueeze(1) if group == 1 else mask.repeat(1, group, 1).unsqueeze(1)
    out = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=rows, scale=scale)
    return out.reshape(batch_size, num_heads, num_nodes, values.shape[-1])
