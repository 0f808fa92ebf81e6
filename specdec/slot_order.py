"""How the slots of a KV cache relate to positions, and what the nodes of a tree see of them."""

from __future__ import annotations

import torch
from torch import Tensor


class SlotOrder:
    """Committed tokens in order, then the nodes of the tree in flight."""

    regular = True
    """Whether slot s of what ``write`` returns is position s. Compiled layers read, and write, such caches alone."""
    in_forms = False
    """Whether tokens may be held in two forms (``kv_quantized``), which parts of compiled layers read as well."""
    longest_pass: int | None = None
    """Most tokens of a text appended in one pass; None is no limit."""
    lengths: Tensor
    """``[B]`` int64, committed tokens."""

    @property
    def max_length(self) -> int:
        """Length of the longest row."""
        raise NotImplementedError

    def visibility(self, depth: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """What nodes see of the slots that ``write`` returns, ``[B, n, S]`` bool, and the slots' positions ``[B, S]``.

        Args:
            depth: ``[B, M]`` int64, of the tree's nodes; the last n are those of the pass.
            ancestors: ``[B, n, M]`` bool.
        """
        lengths = self.lengths.unsqueeze(1)  # [B, 1]
        slots = torch.arange(self.max_length + depth.shape[1], device=depth.device)  # [S]
        relative = slots - lengths  # [B, S]
        node = relative.clamp(0, depth.shape[1] - 1)
        in_tree = (relative >= 0) & (relative < depth.shape[1])
        seen = ancestors.gather(2, node.unsqueeze(1).expand(-1, ancestors.shape[1], -1))
        visible = (relative < 0).unsqueeze(1) | (in_tree.unsqueeze(1) & seen)
        return visible, torch.where(in_tree, lengths + depth.gather(1, node), slots)
