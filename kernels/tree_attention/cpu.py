"""Tree attention through PyTorch's fused kernels, the query heads of a KV head packed into rows."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.tree_attention import reference
from specdec.kernels.tree_attention.combine import apply_sinks, combine
from specdec.kernels.tree_attention.mask import TreeMask
from specdec.kernels.tree_attention.storage import PLAIN, KVFormat

_BLOCK = 1024
"""Slots whose scores are held at a time where there is a soft-cap."""

_UNMASKED_FROM = 4096
"""Committed slots from which a second call and the merge cost less than a mask over them."""


def tree_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """See ``specdec.kernels.tree_attention.tree_attention``; without soft-cap and sinks."""
    batch_size, num_heads, num_nodes, width = query.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    packed = query.reshape(batch_size, num_kv_heads, group * num_nodes, width)
    rows = mask.unsqueeze(1) if group == 1 else mask.repeat(1, group, 1).unsqueeze(1)
    out = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=rows, scale=scale)
    return out.reshape(batch_size, num_heads, num_nodes, values.shape[-1])


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
    """See ``specdec.kernels.tree_attention.tree_attention_with_lse``.

    Slots that are not seen, up to the end of the longest row, have weight 0 and must hold finite numbers.
    """
    if query.dtype == torch.float64:
        return reference.tree_attention_with_lse(query, keys, values, mask, scale, softcap, sinks, storage)
    keys, values = storage.dense(keys, values, query.dtype)
    if softcap is not None:
        out, lse = _capped(query, keys, values, mask, scale, softcap)
    elif isinstance(mask, TreeMask):
        out, lse = _by_rules(query, keys, values, mask, scale)
    else:
        out, lse = _fused(query, keys, values, mask, scale)
    return (out if sinks is None else apply_sinks(out, lse, sinks)), lse


def _by_rules(query: Tensor, keys: Tensor, values: Tensor, mask: TreeMask, scale: float) -> tuple[Tensor, Tensor]:
    """Long contexts in two parts: what is committed in every row without a mask, which need not be read then."""
    lengths = mask.lengths.tolist()
    end = min(max(lengths) + mask.num_tree, keys.shape[2])
    # Nothing before is inside any node's window.
    start = 0 if mask.window is None else max(0, min(lengths) - mask.window + 1)
    common = min(lengths) if mask.window is None and min(lengths) >= _UNMASKED_FROM else start
    parts = []
    if common > start:
        parts.append(_fused(query, keys[:, :, :common], values[:, :, :common], None, scale))
    if end > common:
        visible = mask.dense(end, common)
        parts.append(_fused(query, keys[:, :, common:end], values[:, :, common:end], visible, scale))
    if not parts:
        return _nothing(query, values)
    return parts[0] if len(parts) == 1 else combine(parts, query.dtype)


def _nothing(query: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries that see no slot."""
    shape = (*query.shape[:3], values.shape[-1])
    return query.new_zeros(shape), query.new_full(shape[:3], -torch.inf, dtype=torch.float32)


def _fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One call of the CPU's flash attention, which also knows the log-sum-exp."""
    packed = _pack(query, keys.shape[1])
    bias = unseen = None
    if mask is not None:
        rows = _mask_rows(mask, query.shape[1] // keys.shape[1])
        bias = torch.zeros(rows.shape, dtype=query.dtype, device=query.device).masked_fill_(~rows, -torch.inf)
        unseen = ~rows.any(-1)
    width = max(keys.shape[-1], values.shape[-1])  # of this kernel heads are as wide as values: zeros fill up
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _widen(packed, width), _widen(keys, width), _widen(values, width), attn_mask=bias, scale=scale
    )
    out = out[..., : values.shape[-1]]
    if unseen is not None:
        out, lse = out.masked_fill(unseen.unsqueeze(-1), 0.0), lse.masked_fill(unseen, -torch.inf)
    return out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])


def _capped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | TreeMask, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """With a soft-cap, which no fused kernel of the CPU has: products of float32, a block of slots after the other."""
    end = keys.shape[2]
    if isinstance(mask, TreeMask):
        end = min(int(mask.lengths.max()) + mask.num_tree, end)
    packed = _pack(query.float() * (scale / softcap), keys.shape[1])
    parts = []
    for start in range(0, end, _BLOCK):
        stop = min(start + _BLOCK, end)
        visible = mask.dense(stop, start) if isinstance(mask, TreeMask) else mask[:, :, start:stop]
        hidden = ~_mask_rows(visible, query.shape[1] // keys.shape[1])
        scores = packed @ keys[:, :, start:stop].float().transpose(-1, -2)
        scores = scores.tanh_().mul_(softcap).masked_fill_(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse.clamp(min=-softcap).unsqueeze(-1)).exp_()  # of a node that sees nothing: 0
        out = weights @ values[:, :, start:stop].float()
        parts.append((out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])))
    return combine(parts, query.dtype) if parts else _nothing(query, values)


def _pack(query: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, H, n, d]`` to ``[B, H_kv, G * n, d]``."""
    return query.reshape(query.shape[0], num_kv_heads, -1, query.shape[-1])


def _mask_rows(mask: Tensor, group: int) -> Tensor:
    """``[B, n, S]`` to ``[B, 1, G * n, S]``."""
    return mask.unsqueeze(1) if group == 1 else mask.repeat(1, group, 1).unsqueeze(1)


def _widen(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return tensor if missing == 0 else torch.nn.functional.pad(tensor, (0, missing))
