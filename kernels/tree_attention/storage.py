"""Keys and values in the forms the cache may hold them in: paged, and quantized with a scale per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUANTIZED = (torch.int8, torch.float8_e4m3fn)
"""Types of quantized keys and values."""


@dataclass(frozen=True)
class KVFormat:
    """How ``keys`` and ``values`` are stored, where that is not one plain block per row.

    Attributes:
        block_table: ``[B, P]`` int32 or int64: slot s of row b is slot ``s % page`` of page
            ``block_table[b, s // page]``; keys and values are then ``[num_pages, H_kv, page, d]``. None where they are
            ``[B, H_kv, S, d]``.
        key_scales: broadcastable to keys without their last dimension, ``[B, H_kv, S]`` or ``[num_pages, H_kv, page]``;
            a key is its stored numbers times its scale. Needed when keys are int8 or float8_e4m3fn. A scale per channel
            belongs into the query.
        value_scales: the same for values.
    """

    block_table: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raise ValueError where scales are missing or out of place."""
        for name, stored, scales in (("keys", keys, self.key_scales), ("values", values, self.value_scales)):
            if (stored.dtype in QUANTIZED) != (scales is not None):
                raise ValueError(
                    f"{name} are {stored.dtype} {'without' if scales is None else 'with'} scales: int8 and "
                    "float8_e4m3fn need them, other types must not have them"
                )
        if keys.dtype != values.dtype:
            raise ValueError(f"keys and values must be of one type, got {keys.dtype} and {values.dtype}")

    def num_slots(self, keys: Tensor) -> int:
        """Slots a row can address."""
        return keys.shape[2] if self.block_table is None else self.block_table.shape[1] * keys.shape[2]

    def dense(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as ``[B, H_kv, S, d]`` in ``dtype``; what is so already is returned as it is."""
        return self._dense(keys, self.key_scales, dtype), self._dense(values, self.value_scales, dtype)

    def _dense(self, stored: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        if scales is not None:
            scales = scales.expand(stored.shape[:-1])
        if self.block_table is not None:
            stored = _rows(stored, self.block_table)
            scales = None if scales is None else _rows(scales, self.block_table)
        if scales is None:
            return stored.to(dtype)
        compute = torch.promote_types(dtype, torch.float32)
        return (stored.to(compute) * scales.to(compute).unsqueeze(-1)).to(dtype)


PLAIN = KVFormat()


def _rows(pages: Tensor, block_table: Tensor) -> Tensor:
    """``[num_pages, H_kv, page, ...]`` to ``[B, H_kv, P * page, ...]``."""
    return pages[block_table.to(torch.int64)].transpose(1, 2).flatten(2, 3)
