"""Weights as our own CPU kernels read them: each once, in order, a stream per thread.

oneDNN's kernels read a weight of a few megabytes at two thirds of the memory's speed, and their sums have another order
for one row than for many. These do neither (``specdec.kernels.decoder_layer``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.kernels.decoder_layer import LANES, PANEL, Kernels, Numbers, find_kernels
from specdec.pages import WEIGHTS
from specdec.quantized_weight import round_rows

_ROUNDED = 8 * PANEL
"""Rows of a weight that are rounded at a time."""


def panels_run() -> bool:
    """Whether the kernels run on this processor, and a compiler was found."""
    kernels = find_kernels()
    return kernels is not None and kernels.has_products


class PanelWeight(nn.Module):
    """A bfloat16 weight in panels of output channels; the layouts are ``product.h``'s.

    Args:
        weight: ``[out, in]``, bfloat16 on the CPU; ``in`` is even.
        bias: ``[out]``.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None
    shifts: Tensor | None
    kind = Numbers.IN_16_BIT
    step = 2
    """Input channels that lie beside each other."""
    group = 0
    has_zero_points = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._hold(self.laid_out(weight.detach()), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Nothing: kernels know the buffers' addresses and types, which ``model.to`` must not change."""
        return self

    def _hold(self, buffers: dict[str, Tensor | None], bias: Tensor | None) -> None:
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone().contiguous(), persistent=False)
        kernels = find_kernels()
        assert kernels is not None
        self._kernels: Kernels = kernels

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        """Whether the kernels take a weight of this shape."""
        return weight.dtype == torch.bfloat16 and weight.shape[1] % cls.step == 0

    @classmethod
    def serves(cls, weight: Tensor) -> bool:
        """Whether it ``fits``, and the kernels run here."""
        return weight.device.type == "cpu" and cls.fits(weight) and panels_run()

    def laid_out(self, weight: Tensor) -> dict[str, Tensor | None]:
        """The buffers ``weight``, ``scales`` and ``shifts``."""
        panels = self._panels(weight)
        return {"weight": WEIGHTS.zeros(panels.shape, panels.dtype).copy_(panels), "scales": None, "shifts": None}

    def _panels(self, weight: Tensor) -> Tensor:
        """``[out / PANEL, in / step, PANEL, step]``: a view where the last panel is full."""
        missing = -len(weight) % PANEL
        padded = F.pad(weight, (0, 0, 0, missing)) if missing else weight
        return padded.view(-1, PANEL, weight.shape[1] // self.step, self.step).permute(0, 2, 1, 3)

    def _rows(self) -> Tensor:
        """``weight`` as ``[out, in]``."""
        return self.weight.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[: self.out_features]

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        rows = inputs.reshape(-1, self.in_features).contiguous()
        return self._kernels.product(rows, self).view(*inputs.shape[:-1], self.out_features)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """``residual`` plus the layer's output, rounded once."""
        rows = inputs.reshape(-1, self.in_features).contiguous()
        added = residual.reshape(-1, self.out_features).contiguous()
        return self._kernels.product(rows, self, added).view(residual.shape)

    def dense(self) -> Tensor:
        """``[out, in]``, a copy."""
        return self._rows().contiguous()


class Int8PanelWeight(PanelWeight):
    """The same in int8 with a scale per output channel; activations stay as they are.

    The product is that of the codes in bfloat16, times the scales.
    """

    scales: Tensor
    kind = Numbers.WEIGHTS_IN_8_BIT

    @property
    def _signs_lie_apart(self) -> bool:
        kernels = find_kernels()
        return kernels is not None and kernels.signs_lie_apart

    def laid_out(self, weight: Tensor) -> dict[str, Tensor | None]:
        # What stays is allocated first, and filled some panels at a time: memory that comes and goes in between would
        # leave gaps which the allocator keeps.
        count = -(-len(weight) // PANEL)
        panels = WEIGHTS.zeros((count, weight.shape[1] // self.step, PANEL, self.step), torch.int8)
        scales = torch.zeros(count * PANEL)
        shifts = torch.zeros(count * PANEL, dtype=torch.int32) if self.kind is Numbers.BOTH_IN_8_BIT else None
        for first in range(0, len(weight), _ROUNDED):
            whole, sizes = round_rows(weight[first : first + _ROUNDED])
            rows = slice(first, first + len(whole))
            scales[rows] = sizes
            if shifts is not None:
                shifts[rows] = 128 * whole.sum(-1, dtype=torch.int32)
            made = self._stored(self._panels(whole))
            panels[first // PANEL : first // PANEL + len(made)] = made
        return {"weight": panels, "scales": scales, "shifts": shifts}

    def _stored(self, panels: Tensor) -> Tensor:
        """Panels as they lie in memory; with signs apart 64 numbers in a line, the halves' four eights by turns."""
        if not self._signs_lie_apart:
            return panels
        lines = panels.reshape(-1, 2, 4, 8).transpose(1, 2).reshape(panels.shape)
        return torch.where(lines < 0, (-lines) | -128, lines)

    def _codes(self) -> Tensor:
        """``[out, in]`` int8."""
        if not self._signs_lie_apart:
            return self._rows()
        lines = self.weight.view(-1, 4, 2, 8).transpose(1, 2).reshape(self.weight.shape)
        panels = torch.where(lines < 0, -(lines & 127), lines)
        return panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[: self.out_features]

    def dense(self) -> Tensor:
        rows = self._codes().float() * self.scales[: self.out_features].unsqueeze(1)
        return rows.to(torch.bfloat16)


class W8A8PanelWeight(Int8PanelWeight):
    """The same for activations in 8 bit, with a scale per row."""

    shifts: Tensor
    kind = Numbers.BOTH_IN_8_BIT
    step = 4
    _signs_lie_apart = False

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and weight.shape[1] % LANES == 0
