"""Acceptance of draft trees by equality, where the logits are. See README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels import device_of, runs_triton
from specdec.kernels.accept import cpu, reference
from specdec.kernels.accept.acceptance import Acceptance
from specdec.sampling import PositionNoise

__all__ = ["Acceptance", "accept", "noise_keys", "serves"]

_TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def serves(logits: Tensor) -> bool:
    """Whether the Triton kernels take these logits: on a GPU with Triton, in 16 or 32 bits."""
    return runs_triton(logits) and logits.dtype in _TRITON_TYPES


def accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None = None, temperature: float = 1.0
) -> Acceptance:
    """Descend from the root while a child holds what the target chooses.

    The choice at a node is the argmax of its logits, ``logits / temperature + g`` with ``keys``; of equals the first
    is taken. Without ``keys`` this is greedy matching, with them the coupled one (Daliri et al. 2024).

    Args:
        logits: ``[B, N, V]`` the target's logits at the nodes, filtered already where that is asked for; -inf excludes.
        tokens: ``[B, N]`` int64.
        parents: ``[B, N]`` int64, each node's parent, which stands before it; negative for the root (column 0) and
            for nodes that must not be accepted. Of siblings with one token the first counts.
        keys: ``[B, L]`` int64 of ``noise_keys``, the noise of each depth; L is above the tree's depth. None: greedy.
        temperature: > 0; read with ``keys`` only.

    Returns:
        An ``Acceptance`` on the logits' device; nothing is copied to the host.

    Raises:
        ValueError: where shapes or types do not fit, or for a temperature that is not above 0.
    """
    check(logits, tokens, parents, keys, temperature)
    if serves(logits):
        from specdec.kernels.accept import triton

        with device_of(logits):
            return triton.accept(logits, tokens, parents, keys, temperature)
    if logits.device.type == "cpu":
        return cpu.accept(logits, tokens, parents, keys, temperature)
    return reference.accept(logits, tokens, parents, keys, temperature)


def noise_keys(noise: Sequence[PositionNoise], positions: Sequence[int], num_levels: int) -> Tensor:
    """``[B, num_levels]`` int64 on the host: the key of the token chosen at depth d of each row.

    Args:
        noise: the rows' noise.
        positions: the position of the token chosen at each row's root.
        num_levels: 1 + the depth of the deepest tree.
    """
    keys = [
        [row.gumbel_key(first + depth) for depth in range(num_levels)]
        for row, first in zip(noise, positions, strict=True)
    ]
    signed = [[key - (1 << 64) if key >> 63 else key for key in row] for row in keys]
    return torch.tensor(signed, dtype=torch.int64)


def check(logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None, temperature: float) -> None:
    """Raise ValueError where an operand does not fit the others."""
    if logits.ndim != 3 or tokens.shape != logits.shape[:2] or parents.shape != tokens.shape or 0 in logits.shape:
        raise ValueError(
            f"logits must be [B, N, V] and tokens and parents [B, N], got {tuple(logits.shape)}, "
            f"{tuple(tokens.shape)} and {tuple(parents.shape)}"
        )
    if not logits.is_floating_point() or tokens.dtype != torch.int64 or parents.dtype != torch.int64:
        raise ValueError(
            f"logits must be floating point, tokens and parents int64, got {logits.dtype}, {tokens.dtype} and "
            f"{parents.dtype}"
        )
    if keys is not None:
        if keys.ndim != 2 or keys.shape[0] != logits.shape[0] or keys.shape[1] == 0 or keys.dtype != torch.int64:
            raise ValueError(f"keys must be [{logits.shape[0]}, L] int64, got {tuple(keys.shape)} {keys.dtype}")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0 with keys, got {temperature}; greedy matching has no keys")
