"""Random 4-bit weights and inputs, and what their product must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.w4a16 import Int4Weight
from specdec.kernels.w4a16.weight import pack_codes


@dataclass(frozen=True)
class ProductCase:
    """Inputs ``[M, K]`` and a weight ``[N, K]``."""

    inputs: Tensor
    weight: Int4Weight

    @property
    def exact(self) -> Tensor:
        """In float64."""
        return self.inputs.double() @ self.weight.dequantize(torch.float64).t()

    @property
    def same_precision(self) -> Tensor:
        """As plain PyTorch computes it, the weight in the inputs' type."""
        return self.inputs @ self.weight.dequantize(self.inputs.dtype).t()

    def check(self, out: Tensor) -> None:
        """The error is at most twice that of PyTorch in the same precision."""
        assert out.dtype == self.inputs.dtype
        allowed = 2.0 * float((self.same_precision.double() - self.exact).abs().max())
        assert float((out.double() - self.exact).abs().max()) <= allowed + 1e-6  # NaN fails, too


def make_product(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int = 128,
    zero_points: bool = True,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    seed: int = 0,
) -> ProductCase:
    """Codes of all values; weights of about unit variance. Rows of the inputs lie apart, with NaN in between."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_outputs, num_inputs // group_size)
    codes = torch.randint(0, 16, (num_outputs, num_inputs), generator=generator)
    scales = (0.1 + 0.2 * torch.rand(shape, generator=generator)).half()
    if zero_points:
        offsets = torch.randint(0, 17, shape, generator=generator).to(torch.uint8)
    else:
        offsets = (-8.0 * scales + torch.randn(shape, generator=generator)).half()
    wide = torch.full((num_rows, num_inputs + 16), torch.nan, dtype=dtype)
    wide[:, :num_inputs] = torch.randn(num_rows, num_inputs, generator=generator).to(dtype)
    weight = Int4Weight(pack_codes(codes, group_size), scales, offsets)
    return ProductCase(wide.to(device)[:, :num_inputs], weight.to(device))
