"""Keys and values that several rows of a batch have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from specdec.kernels.tree_attention import KVFormat
from specdec.kernels.tree_attention.storage import PLAIN


@dataclass(frozen=True, eq=False)
class PrefixLevel:
    """Prefixes, each in front of a range of neighbouring rows. Levels nest: a row may have a prefix of each level.

    Attributes:
        keys: ``[P, H_kv, S, d]``; ``storage`` tells of other layouts.
        values: ``[P, H_kv, S, d_v]``.
        lengths: ``[P]`` int32 or int64, slots of each prefix that count, on the device.
        ranges: first and past-the-last row of each prefix, no row in two of them. Rows in none have no prefix here.
        storage: pages and scales.

    Raises:
        ValueError: for ranges that overlap or run backwards, or numbers of prefixes that differ.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    ranges: tuple[tuple[int, int], ...]
    storage: KVFormat = PLAIN

    def __post_init__(self) -> None:
        held = len(self.keys if self.storage.block_table is None else self.storage.block_table)
        if self.lengths.shape != (len(self.ranges),) or held != len(self.ranges):
            raise ValueError(
                f"{len(self.ranges)} ranges need as many prefixes and lengths, got {held} and "
                f"{tuple(self.lengths.shape)}"
            )
        if any(first < 0 or first > end for first, end in self.ranges):
            raise ValueError(f"a range is a first row and a row past the last, got {self.ranges}")
        filled = sorted(rows for rows in self.ranges if rows[0] < rows[1])
        if any(before[1] > after[0] for before, after in pairwise(filled)):
            raise ValueError(f"ranges of one level overlap: {self.ranges}; a prefix of a prefix is a level of its own")

    @property
    def max_rows(self) -> int:
        """Rows of the largest range."""
        return max((end - first for first, end in self.ranges), default=0)

    @cached_property
    def lengths32(self) -> Tensor:
        """``[P]`` int32, the lengths as kernels read them."""
        return self.lengths.to(torch.int32).contiguous()

    @cached_property
    def row_ranges(self) -> Tensor:
        """``[P, 2]`` int32 on the device, the ranges as kernels read them."""
        return torch.tensor(self.ranges, dtype=torch.int32).view(-1, 2).to(self.keys.device)

    def one(self, index: int) -> tuple[Tensor, Tensor, Tensor, KVFormat]:
        """Keys, values, length and format of one prefix, as for a batch of one row."""
        only = slice(index, index + 1)
        storage = self.storage
        if storage.block_table is not None:
            return self.keys, self.values, self.lengths[only], replace(storage, block_table=storage.block_table[only])
        scales = (
            None if s is None else s.expand(self.keys.shape[:-1])[only]
            for s in (storage.key_scales, storage.value_scales)
        )
        key_scales, value_scales = scales
        storage = replace(storage, key_scales=key_scales, value_scales=value_scales)
        return self.keys[only], self.values[only], self.lengths[only], storage
