"""What the nodes of a batch of token trees may see, as rules rather than as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WORD_BITS = 32


@dataclass(frozen=True)
class TreeMask:
    """Visibility of committed tokens and tree nodes.

    Slot s of row b holds a committed token while ``s < lengths[b]``, and tree node ``s - lengths[b]`` behind it. A node
    sees every committed token and those tree nodes that ``ancestors`` names, as far as the window reaches.

    Attributes:
        lengths: ``[B]`` int32 or int64, committed slots per row, on the device.
        ancestors: ``[B, n, M]`` bool, which of the tree's M nodes each of the n queries sees; the queries are the
            tree's last n nodes. M = 0 leaves the committed slots alone.
        depth: ``[B, M]`` integers, edges from the root; a node's position is ``lengths[b] + depth``. Read with a window
            only.
        window: positions back from a query that it sees, its own included; None sees all.

    Raises:
        ValueError: for shapes that do not fit each other, or a window below 1.
    """

    lengths: Tensor
    ancestors: Tensor
    depth: Tensor
    window: int | None = None

    def __post_init__(self) -> None:
        batch_size, num_nodes, num_tree = self.ancestors.shape
        if self.lengths.shape != (batch_size,) or self.depth.shape != (batch_size, num_tree):
            raise ValueError(
                f"ancestors {tuple(self.ancestors.shape)} need lengths {(batch_size,)} and depth "
                f"{(batch_size, num_tree)}, got {tuple(self.lengths.shape)} and {tuple(self.depth.shape)}"
            )
        if 0 < num_tree < num_nodes:
            raise ValueError(f"the {num_nodes} queries must be nodes of the tree, which has {num_tree}")
        if self.window is not None and (self.window < 1 or num_tree == 0):
            raise ValueError(f"a window needs a tree and at least 1 position, got {self.window} and {num_tree} nodes")

    @property
    def num_nodes(self) -> int:
        """Queries per row, n."""
        return self.ancestors.shape[1]

    @property
    def num_tree(self) -> int:
        """Nodes of the tree, M."""
        return self.ancestors.shape[2]

    @cached_property
    def bits(self) -> Tensor:
        """``[B, n, ceil(M / 32)]`` int32: bit j % 32 of word j // 32 is set where the query sees node j."""
        missing = -self.num_tree % WORD_BITS
        padded = torch.nn.functional.pad(self.ancestors, (0, missing))
        padded = padded.reshape(*self.ancestors.shape[:2], (self.num_tree + missing) // WORD_BITS, WORD_BITS)
        weight = 1 << torch.arange(WORD_BITS, device=padded.device)
        words = (padded * weight).sum(-1)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    @cached_property
    def lengths32(self) -> Tensor:
        """``[B]`` int32, the lengths as kernels read them."""
        return self.lengths.to(torch.int32).contiguous()

    @cached_property
    def depth32(self) -> Tensor:
        """``[B, M]`` int32, the depths as kernels read them."""
        return self.depth.to(torch.int32).contiguous()

    def dense(self, num_slots: int, first: int = 0) -> Tensor:
        """``[B, n, num_slots - first]`` bool, set where a query sees a slot from ``first`` on."""
        slots = torch.arange(first, num_slots, device=self.lengths.device)
        lengths = self.lengths.unsqueeze(1)
        relative = slots - lengths  # [B, S]
        visible = (relative < 0).unsqueeze(1).expand(-1, self.num_nodes, -1)
        if self.num_tree:
            node = relative.clamp(0, self.num_tree - 1)
            in_tree = (relative >= 0) & (relative < self.num_tree)
            seen = self.ancestors.gather(2, node.unsqueeze(1).expand(-1, self.num_nodes, -1))
            visible = visible | (in_tree.unsqueeze(1) & seen)
            if self.window is not None:
                depth = self.depth.to(torch.int64)
                key_positions = torch.where(in_tree, lengths + depth.gather(1, node), slots)  # [B, S]
                positions = lengths + depth[:, self.num_tree - self.num_nodes :]  # [B, n]
                visible = visible & (positions.unsqueeze(2) - key_positions.unsqueeze(1) < self.window)
        return visible


def dense_mask(mask: Tensor | TreeMask, num_slots: int) -> Tensor:
    """``[B, n, num_slots]`` bool from either form of mask."""
    return mask.dense(num_slots) if isinstance(mask, TreeMask) else mask
