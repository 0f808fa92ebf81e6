"""Weights that a file has in blocks of 4 or 8 bits, computed with as they are stored rather than blown up to 16 bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.group_panels import Group4PanelWeight, Group8PanelWeight, GroupW8A8PanelWeight, W4A8PanelWeight
from specdec.kernels.w4a16 import Int4Weight, cpu, w4a16
from specdec.lean_stack import make_lean
from specdec.packing import SIBLINGS, FusedLinear, FusedPart, PackedLinear
from specdec.panels import panels_run
from specdec.quantized_weight import DecodedWeight, QuantizedWeight

Q8_0_GROUP = 32
_Q8_0_BYTES = 34


@dataclass(frozen=True, eq=False)
class Int8Blocks:
    """``[N, K]`` numbers in int8 with a scale per 32 inputs: GGUF's Q8_0.

    Attributes:
        codes: ``[N, K]`` int8.
        scales: ``[N, K / 32]`` float16.
    """

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[N, K]``."""
        groups = self.codes.view(len(self.codes), -1, Q8_0_GROUP).float() * self.scales.float().unsqueeze(-1)
        return groups.flatten(1).to(dtype)


StoredWeight = Int4Weight | Int8Blocks
"""A weight as a file has it."""


def from_q8_0(blocks: Tensor) -> Int8Blocks:
    """A weight in GGUF's Q8_0: ``[N, K / 32 * 34]`` uint8, blocks of a float16 scale and 32 codes.

    Raises:
        ValueError: for rows that are no whole number of blocks.
    """
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % _Q8_0_BYTES:
        raise ValueError(f"blocks must be [N, K / 32 * 34] uint8, got {tuple(blocks.shape)} {blocks.dtype}")
    parts = blocks.reshape(len(blocks), -1, _Q8_0_BYTES)
    scales = parts[:, :, :2].contiguous().view(torch.float16).squeeze(-1)
    return Int8Blocks(parts[:, :, 2:].flatten(1).view(torch.int8).contiguous(), scales)


class StoredInt4(QuantizedWeight):
    """4-bit codes with a scale and an offset per group: GPTQ, AWQ, Q4_1. The product is ``specdec.kernels.w4a16``'s.

    On a CPU the codes lie in the layout of the kernel that reads them, and there alone, from the first call on.

    Args:
        stored: the weight, on its device.
        bias: ``[out]``.
        dtype: of inputs.
    """

    offsets: Tensor | None

    def __init__(self, stored: Int4Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._in_features, self._out_features, self._group = stored.num_inputs, stored.num_outputs, stored.group_size
        self._dtype = dtype
        self._hold({"weight": stored.codes, "scales": stored.scales, "offsets": stored.offsets}, bias)

    def product(self, inputs: Tensor) -> Tensor:
        if self.offsets is not None:
            stored = Int4Weight(self.weight, self.scales, self.offsets)
            if inputs.device.type != "cpu":
                return w4a16(inputs, stored)
            self.weight, self.scales = cpu.prepare(stored, self._dtype)
            self.offsets = None
        return cpu.product(inputs, self.weight, self.scales, self._group, self._out_features)


class StoredInt8(DecodedWeight):
    """int8 codes with a scale per 32 inputs, decoded in each call.

    Args:
        stored: the weight, on its device.
        bias: ``[out]``.
        dtype: of inputs.
    """

    def __init__(self, stored: Int8Blocks, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._in_features, self._dtype = stored.codes.shape[1], dtype
        self._hold({"weight": stored.codes, "scales": stored.scales}, bias)

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return Int8Blocks(self.weight[first:last], self.scales[first:last]).dequantize(dtype)


def install(model: nn.Module, stored: Mapping[str, StoredWeight], dtype: torch.dtype, *, in_8_bit: bool = False) -> int:
    """Replace linear layers of a model by what a file stores for them, in place; siblings become one product.

    Args:
        model: changed in place; the replaced layers' own weights are not read.
        stored: by the layer's name, on the device it is to run on.
        dtype: of inputs.
        in_8_bit: whether inputs become int8 on their way, in groups.

    Returns:
        How many layers were replaced.

    Raises:
        ValueError: for inputs in 8 bit where our own kernels do not run.
    """
    names = {id(module): name for name, module in model.named_modules()}
    count = 0
    for module in list(model.modules()):
        children: dict[str, Any] = {
            name: child for name, child in module.named_children() if names.get(id(child)) in stored
        }
        for siblings in SIBLINGS:
            linears = [children[name] for name in siblings if name in children]
            weights = [stored[names[id(linear)]] for linear in linears]
            whole = _stacked(weights) if len(linears) == len(siblings) else None
            if whole is not None and len({linear.bias is None for linear in linears}) == 1:
                product = FusedLinear(linears, _maker(whole, dtype, in_8_bit))
                for index, name in enumerate(siblings):
                    setattr(module, name, FusedPart(product, index))
                    del children[name]
                count += len(siblings)
        for name, linear in children.items():
            setattr(module, name, PackedLinear(linear, _maker(stored[names[id(linear)]], dtype, in_8_bit)))
            count += 1
    make_lean(model)
    return count


def run_int4(stored: Int4Weight, bias: Tensor | None, dtype: torch.dtype, *, in_8_bit: bool = False) -> nn.Module:
    """A module that multiplies inputs of a dtype by the weight: by our own CPU kernels where they run."""
    if _by_panels(stored, dtype, in_8_bit) and Group4PanelWeight.takes(stored):
        return W4A8PanelWeight(stored, bias) if in_8_bit else Group4PanelWeight(stored, bias)
    if in_8_bit:
        raise ValueError("scales and offsets that float16 lacks cannot be multiplied by activations in 8 bit")
    return StoredInt4(stored, bias, dtype)


def run_int8(stored: Int8Blocks, bias: Tensor | None, dtype: torch.dtype, *, in_8_bit: bool = False) -> nn.Module:
    """The same."""
    if _by_panels(stored, dtype, in_8_bit):
        kind = GroupW8A8PanelWeight if in_8_bit else Group8PanelWeight
        return kind(stored.codes, stored.scales, bias)
    return StoredInt8(stored, bias, dtype)


def check_in_8_bit(device: torch.device, dtype: torch.dtype | str) -> None:
    """Raise ValueError where inputs of this type cannot be multiplied in 8 bit by groups."""
    if not own_kernels_multiply(device, dtype):
        raise ValueError(
            "activations in 8 bit by groups need a CPU, bfloat16 and a C compiler, got "
            f"{device} and {dtype}: quantize='gguf' and 'int4' run everywhere"
        )


def own_kernels_multiply(device: torch.device, dtype: torch.dtype | str) -> bool:
    """Whether our own kernels multiply inputs of this type here, in 16 bits or 8."""
    return dtype == torch.bfloat16 and device.type == "cpu" and panels_run()


def _by_panels(stored: StoredWeight, dtype: torch.dtype, in_8_bit: bool) -> bool:
    if in_8_bit:
        check_in_8_bit(stored.codes.device, dtype)
    return own_kernels_multiply(stored.codes.device, dtype)


def _maker(stored: StoredWeight, dtype: torch.dtype, in_8_bit: bool) -> Any:
    """A weight factory that takes the bias and has the weight."""
    if isinstance(stored, Int4Weight):
        return lambda _, bias: run_int4(stored, bias, dtype, in_8_bit=in_8_bit)
    return lambda _, bias: run_int8(stored, bias, dtype, in_8_bit=in_8_bit)


def _stacked(weights: Sequence[StoredWeight]) -> StoredWeight | None:
    """Weights that read the same input as one; None where their layouts differ."""
    if weights and all(isinstance(weight, Int8Blocks) for weight in weights):
        blocks = [weight for weight in weights if isinstance(weight, Int8Blocks)]
        return Int8Blocks(torch.cat([part.codes for part in blocks]), torch.cat([part.scales for part in blocks]))
    fours = [weight for weight in weights if isinstance(weight, Int4Weight)]
    if not weights or len(fours) != len(weights):
        return None
    if len({(part.group_size, part.has_zero_points, part.scales.dtype) for part in fours}) > 1:
        return None
    return Int4Weight(*(torch.cat([getattr(part, name) for part in fours]) for name in ("codes", "scales", "offsets")))
