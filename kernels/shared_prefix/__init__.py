"""Attention of rows that begin with the same tokens. See README.md for the mathematics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels import device_of, runs_triton
from specdec.kernels.shared_prefix import cpu, reference
from specdec.kernels.shared_prefix.prefix import PrefixLevel
from specdec.kernels.tree_attention import KVFormat, TreeMask
from specdec.kernels.tree_attention.storage import PLAIN

__all__ = ["PrefixLevel", "shared_prefix", "shared_prefix_with_lse"]


def shared_prefix(
    query: Tensor,
    levels: Sequence[PrefixLevel],
    keys: Tensor,
    values: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    storage: KVFormat = PLAIN,
) -> Tensor:
    """Attend from each node to its row's prefixes, and to the row's own slots as ``tree_attention`` does.

    Args:
        query: ``[B, H, n, d]``.
        levels: prefixes, one level each for the system prompt, the examples, the question and so on; their order does
            not matter, as keys carry their positions.
        keys: ``[B, H_kv, S, d]``, the rows' own keys, behind all prefixes; S may be 0.
        values: ``[B, H_kv, S, d_v]``.
        mask: visibility of the own slots; its lengths do not count prefixes. It has no window.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[H]``, logits of a key that carries no value.
        storage: pages and scales of the own keys and values.

    Returns:
        ``[B, H, n, d_v]`` in the query's dtype.

    Raises:
        ValueError: where operands do not fit each other, a range exceeds the batch, or the mask has a window.
    """
    return shared_prefix_with_lse(query, levels, keys, values, mask, scale, softcap, sinks, storage)[0]


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
    """As ``shared_prefix``, with the log-sum-exp that joins it to attention over other keys.

    Returns:
        Output ``[B, H, n, d_v]`` and the natural log-sum-exp ``[B, H, n]`` float32 of the visible slots' scores, sinks
        not counted; 0 and -inf for a node that sees nothing.
    """
    check(query, levels, keys, values, mask, storage)
    operands = (query, levels, keys, values, mask, scale, softcap, sinks, storage)
    if query.dtype != torch.float64:
        if runs_triton(query):
            from specdec.kernels.shared_prefix import triton

            with device_of(query):
                return triton.shared_prefix_with_lse(*operands)
        if query.device.type == "cpu":
            return cpu.shared_prefix_with_lse(*operands)
    return reference.shared_prefix_with_lse(*operands)


def check(
    query: Tensor, levels: Sequence[PrefixLevel], keys: Tensor, values: Tensor, mask: TreeMask, storage: KVFormat
) -> None:
    """Raise ValueError where an operand does not fit the others."""
    from specdec.kernels.tree_attention import check as check_own

    check_own(query, keys, values, mask, storage)
    if mask.window is not None:
        raise ValueError(f"a window ({mask.window}) leaves prefixes row by row: use tree_attention for such layers")
    for number, level in enumerate(levels):
        level.storage.check(level.keys, level.values)
        beyond = [rows for rows in level.ranges if rows[1] > len(query)]
        if beyond:
            raise ValueError(f"level {number} has ranges {beyond}, the batch {len(query)} rows")
        for name, prefix, own in (("keys", level.keys, keys), ("values", level.values, values)):
            if (prefix.shape[1], prefix.shape[-1]) != (own.shape[1], own.shape[-1]):
                raise ValueError(
                    f"{name} of level {number} are {tuple(prefix.shape)}, own ones {tuple(own.shape)}: KV heads and "
                    "width must be the same"
                )
        if level.keys.shape[:-1] != level.values.shape[:-1]:
            raise ValueError(
                f"level {number} has keys {tuple(level.keys.shape)} and values {tuple(level.values.shape)}: they "
                "differ in more than their width"
            )
