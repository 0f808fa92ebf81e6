"""The product with a 4-bit weight on the CPU: PyTorch's int4 kernel, or oneDNN on a weight unpacked once or anew."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.w4a16.weight import Int4Weight

IMPLEMENTATIONS = ("int4", "packed", "dequantize")
"""Ways to do it. "int4" reads codes and unpacks them on the way, "packed" keeps the weight dense in oneDNN's layout
(four times the memory of the codes in 16 bits), "dequantize" makes it dense in every call."""

INT4_ROWS = 4
"""Rows up to which "int4" is taken where nothing was measured; above, arithmetic outweighs what it saves in reading."""

_TILE = 16  # outputs; the int4 kernel takes a multiple
_PACKED_ROWS = 16  # rows oneDNN's layout is made for


def default(num_rows: int) -> str:
    """The implementation where none was measured."""
    return "int4" if num_rows <= INT4_ROWS else "packed"


def w4a16(inputs: Tensor, weight: Int4Weight, implementation: str) -> Tensor:
    """Product ``[M, N]`` of ``[M, K]`` inputs in one of the ways ``IMPLEMENTATIONS``.

    "int4" rounds scales and offsets to the inputs' type, the others the weight.

    Raises:
        ValueError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r} of w4a16 on the CPU; choose from {IMPLEMENTATIONS}"
        )
    if implementation == "int4":
        return product(inputs, *_int4(weight, inputs.dtype), weight.group_size, weight.num_outputs)
    if implementation == "packed":
        return _packed(inputs, weight)
    return torch.nn.functional.linear(inputs, weight.dequantize(inputs.dtype))


def prepare(weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight as ``product`` reads it: codes in the int4 kernel's own layout, and ``[K / G, N, 2]`` of ``dtype``.

    Codes stay 4 bits each. The kernel's weight is ``scale * (code - 8) + offset``; N is filled up to whole tiles.
    """
    missing = -weight.num_outputs % _TILE
    codes = torch.nn.functional.pad(weight.unpack().int(), (0, 0, 0, missing))
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), _factors(weight, missing, dtype)


def product(inputs: Tensor, codes: Tensor, factors: Tensor, group_size: int, num_outputs: int) -> Tensor:
    """``[M, N]`` of ``[M, K]`` inputs and a weight that was prepared for their type; each row by itself."""
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs.contiguous(), codes, group_size, factors)
    return out[:, :num_outputs]


def _factors(weight: Int4Weight, missing: int, dtype: torch.dtype) -> Tensor:
    scales = weight.scales.float()
    both = torch.stack([scales, weight.minima() + 8.0 * scales], dim=-1)  # [N, K / G, 2]
    both = torch.nn.functional.pad(both, (0, 0, 0, 0, 0, missing))
    return both.transpose(0, 1).to(dtype).contiguous()


def _int4(weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``prepare``, kept with the weight: codes once, factors by type."""
    name = f"int4 {dtype}"
    if "int4" not in weight.prepared:
        weight.prepared["int4"], weight.prepared[name] = prepare(weight, dtype)
    if name not in weight.prepared:
        weight.prepared[name] = _factors(weight, -weight.num_outputs % _TILE, dtype)
    return weight.prepared["int4"], weight.prepared[name]


def _packed(inputs: Tensor, weight: Int4Weight) -> Tensor:
    """oneDNN on a weight in its own layout where it computes in bfloat16, else on a dense one."""
    reorder = inputs.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    name = f"packed {inputs.dtype}"
    if name not in weight.prepared:
        dense = weight.dequantize(inputs.dtype)
        weight.prepared[name] = torch.ops.mkldnn._reorder_linear_weight(dense, _PACKED_ROWS) if reorder else dense
    if not reorder:
        return torch.nn.functional.linear(inputs, weight.prepared[name])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight.prepared[name], None, "none", [], "")
    return out
