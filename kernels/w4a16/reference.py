"""The product with a 4-bit weight written out, accumulated in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.w4a16.weight import Int4Weight


def w4a16(inputs: Tensor, weight: Int4Weight) -> Tensor:
    """See ``specdec.kernels.w4a16.w4a16``; the weight is not rounded to the inputs' type."""
    compute = torch.promote_types(inputs.dtype, torch.float32)
    return (inputs.to(compute) @ weight.dequantize(compute).t()).to(inputs.dtype)
