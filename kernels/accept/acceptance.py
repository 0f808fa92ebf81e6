"""What the walk of the trees found, in one tensor: one small copy brings it to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_FIELDS = 3
"""Numbers before the path in a row of ``Acceptance.packed``: accepted nodes, bonus token, failure."""


@dataclass(frozen=True)
class Acceptance:
    """The accepted path of each row.

    Attributes:
        packed: ``[B, 3 + N]`` int64: ``num_accepted``, ``bonus``, ``failed`` and ``path``.
    """

    packed: Tensor

    @property
    def num_accepted(self) -> Tensor:
        """``[B]`` int64, accepted nodes, the root not counted."""
        return self.packed[:, 0]

    @property
    def bonus(self) -> Tensor:
        """``[B]`` int64, the token chosen where the path ends; -1 in a failed row."""
        return self.packed[:, 1]

    @property
    def failed(self) -> Tensor:
        """``[B]`` bool, rows with NaN among the logits of a node that had to be decided."""
        return self.packed[:, 2] != 0

    @property
    def path(self) -> Tensor:
        """``[B, N]`` int64 columns, the root first; past the accepted nodes the last one is repeated."""
        return self.packed[:, NUM_FIELDS:]

    def cpu(self) -> Acceptance:
        """The same on the host, by one copy."""
        return Acceptance(self.packed.cpu())

    @classmethod
    def from_rows(cls, rows: list[tuple[list[int], int, bool]], num_nodes: int, device: torch.device) -> Acceptance:
        """From each row's path, bonus token and failure."""
        packed = [
            [len(path) - 1, -1 if failed else bonus, int(failed), *path, *([path[-1]] * (num_nodes - len(path)))]
            for path, bonus, failed in rows
        ]
        return cls(torch.tensor(packed, dtype=torch.int64, device=device))
