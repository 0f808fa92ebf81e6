"""Attention of tree nodes over committed tokens and the tree itself. See README.md for the mathematics."""

from __future__ import annotations

from torch import Tensor

from specdec.kernels.tree_attention import cpu, reference

__all__ = ["tree_attention"]


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from each node to the slots its mask allows.

    Args:
        query: ``[B, H, n, d]``.
        keys: ``[B, H_kv, S, d]``; H is a multiple of H_kv, head h reads KV head ``h // (H / H_kv)``.
        values: ``[B, H_kv, S, d_v]``.
        mask: ``[B, n, S]`` bool, set where slot s is visible to the node; at least one per node.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks: ``[H]``, logits of a key that carries no value (gpt-oss).

    Returns:
        ``[B, H, n, d_v]`` in the query's dtype.
    """
    if softcap is None and sinks is None:
        return cpu.tree_attention(query, keys, values, mask, scale)
    return reference.tree_attention(query, keys, values, mask, scale, softcap, sinks)
