"""Tree attention written out, accumulated in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.tree_attention.mask import TreeMask, dense_mask
from specdec.kernels.tree_attention.storage import PLAIN, KVFormat


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See ``specdec.kernels.tree_attention.tree_attention``."""
    compute = torch.promote_types(query.dtype, torch.float32)
    batch_size, num_heads, num_nodes, _ = query.shape
    group = num_heads // keys.shape[1]
    packed = query.to(compute).reshape(batch_size, keys.shape[1], group, num_nodes, -1)  # [B, H_kv, G, n, d]
    scores = packed @ keys.to(compute).unsqueeze(2).transpose(-1, -2) * scale  # [B, H_kv, G, n, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(compute).view(1, keys.shape[1], group, 1, 1).expand(batch_size, -1, -1, num_nodes, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ values.to(compute).unsqueeze(2)).flatten(1, 2).to(query.dtype)


def tree_attention_with_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    storage: KVFormat = PLAIN,
) -> tuple[Tensor, Tensor]:
    """See ``specdec.kernels.tree_attention.tree_attention_with_lse``; slots that nobody sees may hold NaN."""
    compute = torch.promote_types(query.dtype, torch.float32)
    keys, values = storage.dense(keys, values, compute)
    visible = dense_mask(mask, keys.shape[2])
    seen = visible.any(1)[:, None, :, None]
    batch_size, num_heads, num_nodes, _ = query.shape
    group = num_heads // keys.shape[1]
    packed = query.to(compute).reshape(batch_size, keys.shape[1], group, num_nodes, -1)  # [B, H_kv, G, n, d]
    scores = packed @ keys.unsqueeze(2).transpose(-1, -2) * scale  # [B, H_kv, G, n, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    total = lse = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(compute).view(1, keys.shape[1], group, 1).expand_as(lse))
    weights = (scores - total.unsqueeze(-1)).exp().masked_fill(~visible[:, None, None], 0.0)
    out = (weights @ values.masked_fill(~seen, 0.0).unsqueeze(2)).flatten(1, 2)
    return out.to(query.dtype), lse.flatten(1, 2)
