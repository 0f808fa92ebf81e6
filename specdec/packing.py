"""Linear layers whose weights are laid out once for the CPU's matrix kernels, and siblings fused into one call.

PyTorch's linear layer in bfloat16 reorders its weight into oneDNN's blocked layout on every call. Here it is done once.
Projections that read the same input (query, key and value; gate and up) become one product: on a CPU a call costs tens
of microseconds whatever its size. Packing happens on the loaded transformers modules; no modelling code is replaced.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.panels import PanelWeight, panels_run

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, within one module, of linear layers that read the same input."""

WeightFactory = Callable[[Tensor, Tensor | None], Any]
"""Makes of a weight ``[out, in]`` and a bias ``[out]`` a module like ``PackedWeight``."""

PACKED_ROWS = 16
"""Rows the layout is chosen for; a tree has about as many nodes."""

MOST_PADDED = 8
"""Products are padded to so many rows at most, for their results not to depend on how many there are."""

_PROBED = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64)
"""Numbers of rows compared with each other; the last is the reference."""

_PART = 32
"""Rows of a part, where the library computes more rows another way: with a matrix unit (AMX) it blocks their sums
differently."""

_COMPARED = 1 << 15
"""Results of each number of rows that are compared, where so many are to be had: few show a difference."""

_ROW_LIMITS: dict[tuple[tuple[int, ...], int], RowLimits] = {}
"""By shape and threads."""


def can_pack(model: nn.Module) -> bool:
    """Whether packing helps: bfloat16 weights on a CPU that computes in it."""
    weight = next(model.parameters())
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu_takes_bfloat16()


def cpu_takes_bfloat16() -> bool:
    """Whether products with bfloat16 weights are fast on this CPU: by our own kernels, or oneDNN's."""
    return panels_run() or onednn_takes_bfloat16()


def onednn_takes_bfloat16() -> bool:
    """Whether oneDNN, which needs instructions for it, is there and has them."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module, pack: WeightFactory | None = None) -> int:
    """Replace the linear layers of a model by packed ones, in place; their dense weights are released.

    Outputs stay what they were but for rounding. Weights that are tied to another module's stay there as well.

    Args:
        model: changed in place.
        pack: what weights become; panels or oneDNN's layout where None, whichever is faster here.

    Returns:
        How many linear layers were packed.
    """
    count = released = 0
    # A list of all modules would keep replaced ones, and their weights, to the end.
    for module in [module for module in model.modules() if next(module.children(), None) is not None]:
        if count > released:
            release_memory()
            released = count
        children = dict(module.named_children())
        for names in SIBLINGS:
            linears = [linear for name in names for linear in _plain(children.get(name))]
            if len(linears) == len(names) and _fit(linears):
                product = FusedLinear(linears, pack)
                for index, name in enumerate(names):
                    setattr(module, name, FusedPart(product, index))
                count += len(names)
        for name, child in children.items():
            for linear in _plain(child):
                if getattr(module, name) is linear:  # not fused
                    setattr(module, name, PackedLinear(linear, pack))
                    count += 1
    return count


def release_memory() -> None:
    """Give what was freed back to the system; glibc keeps it where it lies between what is still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def pack_weight(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A bfloat16 weight in the layout that is fastest on this CPU."""
    if PanelWeight.serves(weight):
        return PanelWeight(weight, bias)
    return PackedWeight(weight, bias) if onednn_takes_bfloat16() else PlainWeight(weight, bias)


@dataclass(frozen=True)
class RowLimits:
    """How many rows a product may have for a row's result to be the same among any number of others.

    Attributes:
        least: fewer are padded to it.
        most: more are computed in parts of it; None for any number at once.
    """

    least: int
    most: int | None


class PlainWeight(nn.Module):
    """A weight as it is, for PyTorch's own product."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return F.linear(inputs, self.weight, self.bias)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """``residual`` plus the layer's output."""
        return residual + F.linear(inputs, self.weight, self.bias)

    def dense(self) -> Tensor:
        """``[out, in]``, a copy."""
        return self.weight.clone()


class PackedWeight(nn.Module):
    """A weight in oneDNN's layout. It is a buffer, so that whoever adds up a model's bytes finds it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)
        self._limits: RowLimits | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self._alike(self._product, inputs)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """``residual`` plus the layer's output, rounded once."""
        return self._alike(self._sum, residual, inputs)

    def _product(self, inputs: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return out

    def _sum(self, residual: Tensor, inputs: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, self.weight, self.bias, "add")
        return out

    def _alike(self, compute: Callable[..., Tensor], *states: Tensor) -> Tensor:
        """``compute`` of states ``[..., d]``, in products of numbers of rows that the library computes alike."""
        rows = states[0].numel() // states[0].shape[-1]
        limits = self._row_limits()
        if limits.least <= rows <= (limits.most or rows):
            return compute(*states)
        flat = [each.flatten(0, -2) for each in states]
        size = limits.most or rows
        parts = []
        for start in range(0, rows, size):
            block = [each[start : start + size] for each in flat]
            missing = max(limits.least - len(block[0]), 0)
            out = compute(*(F.pad(each, (0, 0, 0, missing)) for each in block) if missing else block)
            parts.append(out[: len(block[0])])
        return torch.cat(parts).view(*states[0].shape[:-1], -1)

    def _row_limits(self) -> RowLimits:
        if self._limits is None:
            key = tuple(self.weight.shape), torch.get_num_threads()
            if key not in _ROW_LIMITS:
                _ROW_LIMITS[key] = self._find_row_limits()
            self._limits = _ROW_LIMITS[key]
        return self._limits

    @torch.inference_mode()
    def _find_row_limits(self) -> RowLimits:
        """Of the most rows that are alike from the fewest on: many, or up to a part."""
        for most in (None, _PART):
            least = self._find_least_rows(most or _PROBED[-1])
            if least <= MOST_PADDED:
                return RowLimits(least, most)
        return RowLimits(1, None)

    def _find_least_rows(self, most: int) -> int:
        """The fewest rows whose results are those among ``most``, to the bit.

        The library picks its kernel by the number of rows. A result is compared where it almost cancels against its own
        rounded value: what is left shows float32 sums of another order, which rounding to bfloat16 hides nearly always,
        but not always.
        """
        generator = torch.Generator().manual_seed(0)
        width = self.weight.shape[1]
        inputs = torch.randn(most, width, generator=generator).to(self.weight.dtype)
        rounded = -self._product(inputs)
        expected = self._sum(rounded, inputs)
        least = 1
        for rows in (rows for rows in _PROBED if rows < most):
            blocks = min(most // rows, -(-_COMPARED // (rows * len(self.weight))))
            for start in range(0, blocks * rows, rows):
                block = slice(start, start + rows)
                found = self._sum(rounded[block].contiguous(), inputs[block].contiguous())
                if not torch.equal(found, expected[block]):
                    least = rows + 1
                    break
        return least

    def dense(self) -> Tensor:
        """``[out, in]``, a copy."""
        dense: Tensor = self.weight.to_dense()
        return dense


class PackedLinear(nn.Module):
    """A linear layer with a packed weight; ``weight`` gives it back dense."""

    packed: Any

    def __init__(self, linear: nn.Linear, pack: WeightFactory | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = (pack or pack_weight)(linear.weight, linear.bias)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a copy."""
        dense: Tensor = self.packed.dense()
        return dense

    @property
    def bias(self) -> Tensor | None:
        """``[out]``."""
        bias: Tensor | None = self.packed.bias
        return bias

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.packed(inputs)
        return out


class FusedLinear(nn.Module):
    """Several linear layers as one; the last input's outputs are kept until each was asked for."""

    packed: Any

    def __init__(self, linears: Sequence[nn.Linear], pack: WeightFactory | None = None) -> None:
        super().__init__()
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat(biases) if biases else None
        self.packed = (pack or pack_weight)(torch.cat([linear.weight for linear in linears]), bias)
        self._widths = [linear.out_features for linear in linears]
        self._inputs: tuple[Tensor, int] | None = None  # and its version
        self._waiting: dict[int, Tensor] = {}

    def dense(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight ``[out, in]`` and bias ``[out]`` of one of them, copies."""
        dense: Tensor = self.packed.dense()
        bias: Tensor | None = self.packed.bias
        parts = torch.split(dense, self._widths)
        return parts[index], None if bias is None else torch.split(bias, self._widths)[index]

    def part(self, index: int, inputs: Tensor) -> Tensor:
        version = 0 if inputs.is_inference() else inputs._version  # inference tensors count no changes
        known = self._inputs is not None and self._inputs[0] is inputs and self._inputs[1] == version
        if not known or index not in self._waiting:
            self._inputs = inputs, version
            self._waiting = dict(enumerate(torch.split(self.packed(inputs), self._widths, dim=-1)))
        found = self._waiting.pop(index)
        if not self._waiting:
            self._inputs = None
        return found


class FusedPart(nn.Module):
    """One of several linear layers that read the same input; the first one called computes all."""

    def __init__(self, product: FusedLinear, index: int) -> None:
        super().__init__()
        self.product, self.index = product, index

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a copy."""
        return self.product.dense(self.index)[0]

    @property
    def bias(self) -> Tensor | None:
        """``[out]``."""
        return self.product.dense(self.index)[1]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.product.part(self.index, inputs)


def _plain(module: nn.Module | None) -> list[nn.Linear]:
    """The module where it is a linear layer and nothing more, in a list."""
    return [module] if isinstance(module, nn.Linear) and type(module) is nn.Linear else []


def _fit(linears: Sequence[nn.Linear]) -> bool:
    first = linears[0]
    return all(
        linear.in_features == first.in_features and (linear.bias is None) == (first.bias is None) for linear in linears
    )
