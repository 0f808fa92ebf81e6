"""A linear layer's weight in 4-bit codes with a scale and an offset per group of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
"""Group sizes the kernels are made for."""


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """``[N, K]`` numbers, N outputs and K inputs, in groups of G neighbouring inputs.

    Attributes:
        codes: ``[N, K / 2]`` uint8, two codes of 0 to 15 each. Byte ``g * G / 2 + j`` of a row holds input
            ``g * G + j`` in its low half and ``g * G + G / 2 + j`` in its high half, as blocks of GGUF's Q4_1 do for
            G = 32.
        scales: ``[N, K / G]`` floating point.
        offsets: ``[N, K / G]``: zero points (uint8), the weight is ``scale * (code - offset)``; or minima (of the
            scales' type), the weight is ``scale * code + offset``.

    Raises:
        ValueError: for types and shapes that do not fit each other, or another group size.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    prepared: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Forms of the weight that a path made once and kept, by a name of its own."""

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise ValueError(f"codes must be [N, K / 2] uint8, got {tuple(self.codes.shape)} {self.codes.dtype}")
        if self.scales.ndim != 2 or self.scales.shape != self.offsets.shape or len(self.scales) != len(self.codes):
            raise ValueError(
                f"scales and offsets must be [{len(self.codes)}, K / G], got {tuple(self.scales.shape)} and "
                f"{tuple(self.offsets.shape)}"
            )
        if not self.scales.is_floating_point() or self.offsets.dtype not in (torch.uint8, self.scales.dtype):
            raise ValueError(
                f"scales must be floating point and offsets uint8 or of the scales' type, got {self.scales.dtype} and "
                f"{self.offsets.dtype}"
            )
        columns, groups = self.codes.shape[1] * 2, self.scales.shape[1]
        if groups == 0 or columns % groups or columns // groups not in GROUP_SIZES:
            raise ValueError(f"{columns} inputs in {groups} groups: a group must have {GROUP_SIZES} inputs")

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def num_inputs(self) -> int:
        """K."""
        return 2 * self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """G."""
        return self.num_inputs // self.scales.shape[1]

    @property
    def has_zero_points(self) -> bool:
        """Whether offsets are zero points; else they are minima."""
        return self.offsets.dtype == torch.uint8

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and offsets: what a pass over the weight must read."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.offsets))

    def to(self, device: torch.device | str) -> Int4Weight:
        """The weight on a device; what paths prepared is left behind."""
        return Int4Weight(self.codes.to(device), self.scales.to(device), self.offsets.to(device))

    def unpack(self) -> Tensor:
        """The codes, ``[N, K]`` uint8."""
        halves = self.codes.view(self.num_outputs, -1, self.group_size // 2)
        return torch.cat([halves & 15, halves >> 4], dim=-1).flatten(1)

    def minima(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[N, K / G]``, the offsets as minima."""
        if self.has_zero_points:
            return -self.offsets.to(dtype) * self.scales.to(dtype)
        return self.offsets.to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]``, computed in float32 (float64 for that type) and rounded to ``dtype``."""
        compute = torch.promote_types(dtype, torch.float32)
        scales, minima = self.scales.to(compute).unsqueeze(-1), self.minima(compute).unsqueeze(-1)
        codes = self.unpack().view(*self.scales.shape, -1).to(compute)
        if self.has_zero_points:
            return ((codes - self.offsets.to(compute).unsqueeze(-1)) * scales).flatten(1).to(dtype)
        return (codes * scales + minima).flatten(1).to(dtype)


def pack_codes(codes: Tensor, group_size: int) -> Tensor:
    """``[N, K]`` codes of 0 to 15 as ``Int4Weight.codes``."""
    halves = codes.to(torch.uint8).view(len(codes), -1, 2, group_size // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def halves_suffice(weight: Tensor, group_size: int) -> bool:
    """Whether float16 holds the scales ``from_dense`` finds as finely as it holds numbers: none is below its normal
    range.

    Args:
        weight: ``[N, K]``, K a multiple of the group size.
        group_size: of neighbouring inputs.
    """
    groups = weight.view(len(weight), -1, group_size)
    ranges = groups.amax(-1).float() - groups.amin(-1).float()
    return not bool(((ranges > 0) & (ranges < 15.0 * torch.finfo(torch.float16).tiny)).any())


def from_dense(weight: Tensor, group_size: int = 128, zero_points: bool = True) -> Int4Weight:
    """Round a weight to 4 bits by each group's range: no calibration, the baseline of GPTQ's and AWQ's papers.

    Args:
        weight: ``[N, K]``, K a multiple of the group size.
        group_size: 32, 64 or 128.
        zero_points: whole numbers as offsets, so that 0 stays 0; else each group's minimum.

    Raises:
        ValueError: for a weight that does not divide into such groups.
    """
    if weight.ndim != 2 or group_size not in GROUP_SIZES or weight.shape[1] % group_size:
        raise ValueError(f"{tuple(weight.shape)} does not divide into groups of {group_size}, one of {GROUP_SIZES}")
    groups = weight.float().view(len(weight), -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    if zero_points:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scales = ((high - low) / 15.0).clamp(min=torch.finfo(torch.float16).tiny).half()
    divisor = scales.float()
    if zero_points:
        offsets = (-low / divisor).round().clamp(0, 15).to(torch.uint8)
        codes = (groups / divisor.unsqueeze(-1)).round() + offsets.unsqueeze(-1)
    else:
        offsets = low.half()
        codes = ((groups - offsets.float().unsqueeze(-1)) / divisor.unsqueeze(-1)).round()
    return Int4Weight(pack_codes(codes.clamp(0, 15).flatten(1), group_size), scales, offsets)
