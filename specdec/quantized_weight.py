"""What a quantized weight is to ``specdec.packing``, and those whose numbers are decoded in each call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 1e-12
"""Least scale: a channel of zeros must not divide by it."""

_ROWS = 16
"""Rows of a product with a decoded weight. Libraries pick their kernel, and with it the order of a sum, by the number
of rows; always so many, padded, and a row's result does not depend on how many ride along."""
_DECODED = 1 << 22
"""Numbers decoded at a time: what a call takes of memory beside the codes."""
_ROUNDED = 1 << 18
"""Numbers rounded at a time, in float32."""


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]`` as int8 of that shape and float32 scales ``[out]``, symmetric."""
    whole = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    count = max(_ROUNDED // weight.shape[1], 1)
    for first in range(0, len(weight), count):
        rows = slice(first, first + count)
        exact = weight[rows].float()
        scales[rows] = exact.abs().amax(-1).clamp_(min=SMALLEST) / 127
        whole[rows] = (exact / scales[rows].unsqueeze(-1)).round_()
    return whole, scales


class QuantizedWeight(nn.Module):
    """A quantized weight as ``specdec.packing`` runs it."""

    weight: Tensor
    bias: Tensor | None
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._in_features = weight.shape[1]
        self._dtype = weight.dtype
        self._hold(self.quantized(weight.detach()), bias)

    def _hold(self, buffers: dict[str, Tensor], bias: Tensor | None) -> None:
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The buffers that stand for ``weight`` ``[out, in]``; ``weight`` and ``scales`` among them."""
        raise NotImplementedError

    def product(self, inputs: Tensor) -> Tensor:
        """``[rows, in]`` to ``[rows, out]``."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.product(inputs.reshape(-1, self._in_features).contiguous())
        out = out.view(*inputs.shape[:-1], out.shape[-1])
        return out if self.bias is None else out + self.bias

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """``residual`` plus the layer's output."""
        out: Tensor = residual + self(inputs)
        return out

    def dense(self) -> Tensor:
        """``[out, in]``, the numbers the layer computes with."""
        units = torch.eye(self._in_features, dtype=self._dtype, device=self.weight.device)
        return self.product(units).t().contiguous()


class DecodedWeight(QuantizedWeight):
    """A weight that no kernel reads as it is: rows of it are decoded in every call, some at a time, and given up."""

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first`` to ``last`` as ``[last - first, in]``, but for what ``finished`` adds."""
        raise NotImplementedError

    def finished(self, out: Tensor) -> Tensor:
        """``[rows, out]`` from products with what ``decoded`` gives."""
        return out

    def _chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        count = max(1, _DECODED // self._in_features)
        for first in range(0, self.weight.shape[0], count):
            yield self.decoded(first, min(first + count, self.weight.shape[0]), dtype)

    def product(self, inputs: Tensor) -> Tensor:
        blocks = torch.split(F.pad(inputs, (0, 0, 0, -len(inputs) % _ROWS)), _ROWS)
        out = [torch.cat([F.linear(block, rows) for block in blocks]) for rows in self._chunks(inputs.dtype)]
        return self.finished(torch.cat(out, dim=1)[: len(inputs)])

    def dense(self) -> Tensor:
        return self.finished(torch.cat(list(self._chunks(self._dtype))).t()).t().contiguous()


class Fp6Weight(DecodedWeight):
    """Six-bit floating point: a sign, three bits of exponent, two of fraction (e3m2), a scale per output channel.

    FP6-LLM, Xia et al. 2024, sections 3 and 5: sign and exponent lie packed apart from the fractions (4 + 2 bits), and
    codes become numbers by moving bits, here into those of an 8-bit format with the same fraction.
    """

    fractions: Tensor

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        """Whether codes fill whole bytes."""
        return weight.shape[1] % 4 == 0

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        exact = weight.float()
        scales = exact.abs().amax(-1).clamp(min=SMALLEST) / FP6_MAX
        codes = fp6_codes(exact / scales.unsqueeze(-1))
        high, low = codes >> 2, codes & 3
        upper = high.view(len(high), 2, -1)  # halves of the inputs share bytes
        quarters = low.view(len(low), 4, -1)
        fractions = quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6
        # A product with numbers as they are decoded is 2^12 too small.
        return {"weight": upper[:, 0] | upper[:, 1] << 4, "fractions": fractions, "scales": scales * 2.0**_FP6_SHIFT}

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        packed, fractions = self.weight[first:last], self.fractions[first:last]
        half, quarter = packed.shape[1], fractions.shape[1]
        bits = packed.new_empty(len(packed), 2 * half)
        bits[:, :half] = (packed & 8) << 4 | (packed & 7) << 2
        bits[:, half:] = packed & 0x80 | (packed & 0x70) >> 2
        for part in range(4):
            bits[:, part * quarter : (part + 1) * quarter] |= fractions >> 2 * part & 3
        return bits.view(torch.float8_e5m2).to(dtype)

    def finished(self, out: Tensor) -> Tensor:
        return (out.float() * self.scales).to(out.dtype)


FP6_MAX = 28.0
"""The largest number of e3m2."""
_FP6_SHIFT = 12
"""Between the exponents' biases of e3m2 (3) and of float8_e5m2 (15), whose fractions are alike."""


def fp6_codes(numbers: Tensor) -> Tensor:
    """e3m2 codes (uint8: sign, exponent, fraction) nearest to float32 numbers up to ``FP6_MAX`` in size."""
    size = numbers.abs()
    # -2 is the exponent of the least normal number, and counts for those below: frexp says 0 of 0.
    exponent = (torch.frexp(size)[1] - 1).clamp(min=-2).masked_fill(size == 0, -2)
    whole = torch.ldexp(size, 2 - exponent).round().to(torch.int32)  # in steps of 2^(exponent - 2); 8 is the next 4
    codes = whole + 4 * (exponent + 2)  # a normal number's leading 1 (the 4) counts as one exponent
    return codes.clamp(max=31).to(torch.uint8) | (numbers < 0).to(torch.uint8) << 5
