"""Attention of tree nodes over committed tokens and the tree itself. See README.md for the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels import device_of, runs_triton
from specdec.kernels.tree_attention import cpu, reference
from specdec.kernels.tree_attention.mask import TreeMask
from specdec.kernels.tree_attention.storage import PLAIN, KVFormat

__all__ = ["KVFormat", "TreeMask", "serves_rules", "tree_attention", "tree_attention_with_lse"]

MOST_NODES = 256
"""Queries a row up to which the Triton kernel is made for; a prefill's longer chunks go through PyTorch's kernels."""
MOST_WIDTH = 256
"""Of heads, for the same reason: the registers of a program."""
_TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def serves_rules(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether a pass does best to give a ``TreeMask``: the Triton kernel takes these operands.

    It takes them on a GPU with Triton, in types and widths it has, up to 256 nodes a row, and without gradients. With a
    matrix as mask the same operands go through PyTorch's kernels, on any device.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (query, keys, values))
    fits = query.shape[2] <= MOST_NODES and max(keys.shape[-1], values.shape[-1]) <= MOST_WIDTH
    return runs_triton(query) and fits and query.dtype == keys.dtype and query.dtype in _TRITON_TYPES and not wanted


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    storage: KVFormat = PLAIN,
) -> Tensor:
    """Attend from each node to the slots its mask allows.

    Args:
        query: ``[B, H, n, d]``.
        keys: ``[B, H_kv, S, d]``; H is a multiple of H_kv, head h reads KV head ``h // (H / H_kv)``. ``storage`` tells
            of other layouts.
        values: ``[B, H_kv, S, d_v]``.
        mask: ``[B, n, S]`` bool, set where slot s is visible to the node, at least one per node; or the rules it
            follows from, which CUDA devices need for the Triton kernel.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: ``[H]``, logits of a key that carries no value (gpt-oss).
        storage: pages and scales.

    Returns:
        ``[B, H, n, d_v]`` in the query's dtype.

    Raises:
        ValueError: where shapes, types and scales do not fit each other.
    """
    if isinstance(mask, Tensor) and storage is PLAIN:
        if softcap is None and sinks is None:
            return cpu.tree_attention(query, keys, values, mask, scale)
        if query.device.type == "cpu":
            return cpu.tree_attention_with_lse(query, keys, values, mask, scale, softcap, sinks)[0]
        return reference.tree_attention(query, keys, values, mask, scale, softcap, sinks)
    return tree_attention_with_lse(query, keys, values, mask, scale, softcap, sinks, storage)[0]


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
    """As ``tree_attention``, with the log-sum-exp that joins it to attention over other keys.

    Returns:
        Output ``[B, H, n, d_v]`` and the natural log-sum-exp ``[B, H, n]`` float32 of the visible slots' scores, sinks
        not counted; 0 and -inf for a node that sees nothing.
    """
    check(query, keys, values, mask, storage)
    if isinstance(mask, TreeMask) and runs_triton(query) and query.dtype in _TRITON_TYPES:
        from specdec.kernels.tree_attention import triton

        with device_of(query):
            return triton.tree_attention_with_lse(query, keys, values, mask, scale, softcap, sinks, storage)
    if query.device.type == "cpu":
        return cpu.tree_attention_with_lse(query, keys, values, mask, scale, softcap, sinks, storage)
    return reference.tree_attention_with_lse(query, keys, values, mask, scale, softcap, sinks, storage)


def check(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | TreeMask, storage: KVFormat) -> None:
    """Raise ValueError where an operand does not fit the others."""
    storage.check(keys, values)
    if query.shape[1] % keys.shape[1] or query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit keys {tuple(keys.shape)}: heads must be a multiple of KV heads, "
            "of the same width"
        )
    if keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ in more than their width")
    if storage.block_table is None and keys.shape[0] != query.shape[0]:
        raise ValueError(f"query has {query.shape[0]} rows, keys have {keys.shape[0]}")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    nodes = (mask.ancestors if isinstance(mask, TreeMask) else mask).shape[:2]
    if nodes != (query.shape[0], query.shape[2]):
        raise ValueError(f"the mask is for {tuple(nodes)} rows and nodes, query has {(query.shape[0], query.shape[2])}")
