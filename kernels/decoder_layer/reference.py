"""The same written out with PyTorch, in float64: what the compiled kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``Kernels.rms_norm``."""
    return F.rms_norm(states.double(), weight.shape, weight.double(), eps)


def gated(gate_up: Tensor) -> Tensor:
    """See ``Kernels.gated``."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    depth: Tensor,
    seen: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See ``Kernels.attention``; queries, keys and values are rounded to the cache's dtype."""
    batch_size, num_nodes, total = qkv.shape
    kv_heads, width = keys.shape[1], keys.shape[3]
    heads, tree = total // width - 2 * kv_heads, depth.shape[1]
    states = qkv.double().view(batch_size, num_nodes, -1, width).transpose(1, 2)
    query, key, value = torch.split(states, [heads, kv_heads, kv_heads], dim=1)
    cos, sin = (angles.double().unsqueeze(1) for angles in rotary)
    query, key = (part * cos + _half_turn(part) * sin for part in (query, key))
    query = query.to(keys.dtype).double()
    out = torch.zeros(batch_size, num_nodes, heads * width, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        first = length + tree - num_nodes
        keys[row, :, first : first + num_nodes] = key[row].to(keys.dtype)
        values[row, :, first : first + num_nodes] = value[row].to(values.dtype)
        position = length + depth[row, tree - num_nodes :]
        at = torch.cat([torch.arange(length), length + depth[row]])
        visible = torch.cat([torch.ones(num_nodes, length, dtype=torch.bool), seen[row]], dim=1)
        if window is not None:
            visible &= position.unsqueeze(1) - at < window
        end = length + tree
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = query[row, head] @ keys[row, group, :end].double().T * scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            # What is not seen may hold anything.
            known = torch.where(visible.any(0).unsqueeze(1), values[row, group, :end].double(), 0.0)
            out[row, :, head * width : (head + 1) * width] = weights @ known
    return out


def _half_turn(states: Tensor) -> Tensor:
    left, right = states.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)
