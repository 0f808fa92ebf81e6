"""Weights in codes of 4 or 8 bits with a scale per group of inputs, as our own CPU kernels read them.

Codes become bfloat16 numbers on the way to the multiplication, those that the dense weight would hold: a GGUF file's
blocks give to the bit what the same file gives blown up to bfloat16, from a third of the bytes. Or activations become
int8 with a scale for every 32 of them, and codes are multiplied as they are, faster than memory brings them.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.kernels.decoder_layer import PANEL, TOGETHER, Numbers
from specdec.kernels.w4a16 import Int4Weight
from specdec.pages import WEIGHTS
from specdec.panels import PanelWeight

_ROWS = 8 * PANEL
"""Output channels that are laid out at a time."""


class GroupPanelWeight(PanelWeight):
    """What 4-bit and 8-bit codes have in common."""

    scales: Tensor
    _line: ClassVar[int]
    """Bytes of the codes of a panel's channels for ``TOGETHER`` inputs."""

    def __init__(self, shape: tuple[int, int], group: int, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        (self.out_features, self.in_features), self.group = shape, group
        self._count = -(-self.out_features // PANEL)
        codes = WEIGHTS.zeros((self._count, self.in_features // TOGETHER, self._line), torch.uint8)
        self._hold({"weight": codes, "scales": self._factors(), "shifts": None}, bias)

    def _factors(self) -> Tensor:
        """Zeros for the scales."""
        return torch.zeros(self._count, self.in_features // self.group, PANEL, dtype=torch.float16)

    def _fill(self, codes: Tensor, first: int) -> None:
        """Lay out codes ``[rows, in]`` of output channels from ``first`` on, which begins a panel."""
        padded = F.pad(codes, (0, 0, 0, -len(codes) % PANEL))
        count = len(padded) // PANEL
        lines = self._lines(padded.view(count, PANEL, -1, TOGETHER))
        self.weight[first // PANEL : first // PANEL + count] = lines.reshape(count, -1, self._line)

    def _lines(self, codes: Tensor) -> Tensor:
        """``[panels, PANEL, in / TOGETHER, TOGETHER]`` codes as bytes in the order of memory."""
        raise NotImplementedError

    def _panel_codes(self) -> Tensor:
        """The reverse, ``[panels, PANEL, ...]``."""
        raise NotImplementedError

    def _codes(self) -> Tensor:
        """``[out, in]`` float32."""
        return self._panel_codes().reshape(-1, self.in_features)[: self.out_features].float()

    def _by_panels(self, factors: Tensor) -> Tensor:
        """``[out, groups]`` to ``[panels, groups, PANEL]``."""
        return F.pad(factors.half(), (0, 0, 0, -len(factors) % PANEL)).view(self._count, PANEL, -1).transpose(1, 2)

    def _of_channels(self, factors: Tensor) -> Tensor:
        """The reverse, a factor for every input: ``[out, in]`` float32."""
        rows = factors.transpose(1, 2).flatten(0, 1)[: self.out_features].float()
        return rows.repeat_interleave(self.group, dim=1)


class Group4PanelWeight(GroupPanelWeight):
    """4-bit codes with a scale and an offset per group.

    Args:
        stored: the weight; ``takes`` says whether the kernels do.
        bias: ``[out]``.
    """

    kind = Numbers.GROUPS_IN_4_BIT
    _line = PANEL * TOGETHER // 2

    def __init__(self, stored: Int4Weight, bias: Tensor | None) -> None:
        super().__init__((stored.num_outputs, stored.num_inputs), stored.group_size, bias)
        self.has_zero_points = stored.has_zero_points
        for first in range(0, stored.num_outputs, _ROWS):
            rows = slice(first, first + _ROWS)
            self._fill(Int4Weight(stored.codes[rows], stored.scales[rows], stored.offsets[rows]).unpack(), first)
        self.scales[:, :, 0] = self._by_panels(stored.scales)
        self.scales[:, :, 1] = self._by_panels(stored.offsets)

    @classmethod
    def takes(cls, stored: Int4Weight) -> bool:
        """Whether its factors are float16 numbers, and its inputs whole steps of the kernels."""
        return stored.num_inputs % TOGETHER == 0 and _are_half(stored.scales) and _are_half(stored.offsets)

    def _factors(self) -> Tensor:
        return torch.zeros(self._count, self.in_features // self.group, 2, PANEL, dtype=torch.float16)

    def _lines(self, codes: Tensor) -> Tensor:
        # Of every eight channels two lines for eight pairs of inputs each; a channel's two inputs are neighbours, and
        # the pairs lie in their 32 bits from the lowest on.
        split = codes.view(len(codes), PANEL // 8, 8, -1, 2, 8, 2).permute(0, 3, 1, 4, 2, 6, 5)
        return split[..., ::2] | split[..., 1::2] << 4

    def _panel_codes(self) -> Tensor:
        halves = torch.stack([self.weight & 15, self.weight >> 4], -1)
        return halves.view(self._count, -1, PANEL // 8, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 6, 5)

    def dense(self) -> Tensor:
        scales, offsets = self._of_channels(self.scales[:, :, 0]), self._of_channels(self.scales[:, :, 1])
        minima = -offsets * scales if self.has_zero_points else offsets
        return (self._codes() * scales + minima).to(torch.bfloat16)


class W4A8PanelWeight(Group4PanelWeight):
    """The same for activations in 8 bit, with a scale for every ``TOGETHER`` of a row's."""

    kind = Numbers.BYTES_BY_4_BIT_GROUPS

    def _lines(self, codes: Tensor) -> Tensor:
        # Of every eight inputs the first four in the low halves of a channel's bytes, the others in the high ones.
        split = codes.view(len(codes), PANEL, -1, 2, 4).permute(0, 2, 3, 1, 4)  # [panels, in / 8, 2, PANEL, 4]
        return split[:, :, 0] | split[:, :, 1] << 4

    def _panel_codes(self) -> Tensor:
        halves = torch.stack([self.weight & 15, self.weight >> 4], 1)
        return halves.view(self._count, 2, -1, PANEL, 4).permute(0, 3, 2, 1, 4)


class Group8PanelWeight(GroupPanelWeight):
    """int8 codes with a scale per group.

    Args:
        codes: ``[out, in]`` int8, ``in`` a multiple of ``TOGETHER``.
        scales: ``[out, in / group]`` float16.
        bias: ``[out]``.
    """

    kind = Numbers.GROUPS_IN_8_BIT
    _line = PANEL * TOGETHER

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), codes.shape[1] // scales.shape[1], bias)
        for first in range(0, len(codes), _ROWS):
            self._fill(codes[first : first + _ROWS].view(torch.uint8), first)
        self.scales.copy_(self._by_panels(scales))

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and weight.shape[1] % TOGETHER == 0

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """A weight ``[out, in]`` that ``serves``, rounded: of ``TOGETHER`` inputs each the largest becomes 127."""
        groups = weight.float().view(len(weight), -1, TOGETHER)
        scales = (groups.abs().amax(-1) / 127).half().clamp(min=2**-24)  # half's smallest
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return cls(codes.flatten(1), scales, bias)

    def _lines(self, codes: Tensor) -> Tensor:
        return codes.view(len(codes), PANEL, -1, TOGETHER // 2, 2).permute(0, 2, 3, 1, 4)

    def _panel_codes(self) -> Tensor:
        return self.weight.view(torch.int8).view(self._count, -1, TOGETHER // 2, PANEL, 2).permute(0, 3, 1, 2, 4)

    def dense(self) -> Tensor:
        return (self._codes() * self._of_channels(self.scales)).to(torch.bfloat16)


class GroupW8A8PanelWeight(Group8PanelWeight):
    """The same for activations in 8 bit, with a scale for every ``TOGETHER`` of a row's."""

    kind = Numbers.BYTES_BY_8_BIT_GROUPS

    def _lines(self, codes: Tensor) -> Tensor:
        return (codes ^ 128).view(len(codes), PANEL, -1, TOGETHER // 4, 4).permute(0, 2, 3, 1, 4)  # bytes around 128

    def _panel_codes(self) -> Tensor:
        return (self.weight ^ 128).view(torch.int8).view(self._count, -1, PANEL, 4).permute(0, 2, 1, 3)


def _are_half(factors: Tensor) -> bool:
    return factors.dtype in (torch.float16, torch.uint8) or torch.equal(factors.half().float(), factors.float())
