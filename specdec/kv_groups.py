"""Groups of keys and values in 8, 4 or 2 bits, as KIVI has them (Liu et al. 2024, section 3.2).

Keys share a scale and a minimum by channel, over ``GROUP`` positions: few channels hold the large numbers. Values share
them by token, over ``CHANNELS`` channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Positions that share a key channel's scale."""
CHANNELS = 32
"""Channels of a value that share a scale; all of them where they are no multiple."""


def kv_bytes(bits: int, width: int, element: int) -> float:
    """Bytes of a token's key and value of one head, ``width`` numbers each, scales and minima included."""
    factor = 2 * _factor_dtype(element).itemsize
    shared = CHANNELS if width % CHANNELS == 0 else width
    return width * bits / 4 + factor * width / GROUP + factor * (width // shared)


def _factor_dtype(element: int) -> torch.dtype:
    """Of scales and minima: finer than numbers of so many bytes need."""
    return torch.float16 if element <= 2 else torch.float32


def encode(numbers: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8) of numbers, and scale and minimum over ``dim``, stacked before it in its place.

    Args:
        numbers: ``[..., d]``.
        dim: negative; what shares a scale lies along it.
        bits: of a code.
    """
    exact = numbers.float()
    low, high = exact.amin(dim, keepdim=True), exact.amax(dim, keepdim=True)
    dtype = _factor_dtype(numbers.element_size())
    limits = torch.finfo(dtype)
    levels = (1 << bits) - 1
    scale = ((high - low) / levels).clamp(2.0**-24, limits.max).to(dtype)
    factors = torch.cat([scale, low.clamp(limits.min, limits.max).to(dtype)], dim)
    scale, low = factors.float().chunk(2, dim)
    return ((exact - low) / scale).round_().clamp_(0, levels).to(torch.uint8), factors


def decode(codes: Tensor, factors: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for."""
    scale, low = factors.float().chunk(2, dim)
    return (codes.float() * scale + low).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``[..., GROUP, d]`` codes to ``[..., GROUP * bits / 8, d]`` bytes: parts of a group share them."""
    parts = codes.chunk(8 // bits, -2)
    packed = parts[0]
    for index, part in enumerate(parts[1:], 1):
        packed = packed | part << bits * index
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What ``pack`` took."""
    mask = (1 << bits) - 1
    return torch.cat([packed >> bits * index & mask for index in range(8 // bits)], -2)


@dataclass
class Groups:
    """Quantized groups of a layer, rows first: keys and values packed, and their factors.

    Attributes:
        keys: ``[B, H_kv, g, GROUP * bits / 8, d_k]`` uint8.
        key_factors: ``[B, H_kv, g, 2, d_k]``.
        values: ``[B, H_kv, g, GROUP * bits / 8, d_v]`` uint8.
        value_factors: ``[B, H_kv, g, GROUP, d_v / c, 2]``.
    """

    keys: Tensor
    key_factors: Tensor
    values: Tensor
    value_factors: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, bits: int) -> Groups:
        """Whole groups ``[B, H_kv, g * GROUP, d]`` quantized."""
        grouped = [part.view(*part.shape[:2], -1, GROUP, part.shape[3]) for part in (keys, values)]
        width = values.shape[3]
        shared = grouped[1].view(*grouped[1].shape[:4], -1, CHANNELS if width % CHANNELS == 0 else width)
        key_codes, key_factors = encode(grouped[0], -2, bits)
        value_codes, value_factors = encode(shared, -1, bits)
        return cls(pack(key_codes, bits), key_factors, pack(value_codes.flatten(-2), bits), value_factors)

    def read(self, count: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H_kv, count * GROUP, d]`` of the first groups."""
        keys = decode(unpack(self.keys[:, :, :count], bits), self.key_factors[:, :, :count], -2, dtype)
        factors = self.value_factors[:, :, :count]
        codes = unpack(self.values[:, :, :count], bits)
        values = decode(codes.view(*factors.shape[:5], -1), factors, -1, dtype)
        return keys.flatten(2, 3), values.flatten(4).flatten(2, 3)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four."""
        return self.keys, self.key_factors, self.values, self.value_factors

    @property
    def num_bytes(self) -> int:
        """Bytes of all four."""
        return sum(part.nbytes for part in self.parts)

    def select(self, rows: Tensor) -> Groups:
        """These rows, copied."""
        return Groups(*(part[rows] for part in self.parts))

    def resized(self, rows: int, groups: int) -> Groups:
        """Room for so many rows and groups, with what is here."""
        made = []
        for part in self.parts:
            new = part.new_zeros(rows, part.shape[1], groups, *part.shape[3:])
            count = min(groups, part.shape[2])
            new[: part.shape[0], :, :count] = part[:, :, :count]
            made.append(new)
        return Groups(*made)

    def write(self, row: int, first: int, other: Groups) -> None:
        """Put another's only row's groups at ``first``."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine[row, :, first : first + theirs.shape[2]] = theirs[0]
