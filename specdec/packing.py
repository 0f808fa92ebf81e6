"""Linear layers whose weights are laid out once for the CPU's matrix kernels, and siblings fused into one call.

PyTorch's linear layer in bfloat16 reorders its weight into oneDNN's blocked layout on every call. Here it is done once.
Projections that read the same input (query, key and value; gate and up) become one product: on a CPU a call costs tens
of microseconds whatever its size. Packing happens on the loaded transformers modules; no modelling code is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, within one module, of linear layers that read the same input."""

PACKED_ROWS = 16
"""Rows the layout is chosen for; a tree has about as many nodes."""


def can_pack(model: nn.Module) -> bool:
    """Whether packing helps: bfloat16 weights on a CPU whose oneDNN computes in bfloat16."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> int:
    """Replace the linear layers of a model by packed ones, in place; their dense weights are released.

    Outputs stay what they were but for rounding. Weights that are tied to another module's stay there as well.

    Returns:
        How many linear layers were packed.
    """
    count = 0
    for module in list(model.modules()):
        children = dict(module.named_children())
        for names in SIBLINGS:
            linears = [linear for name in names for linear in _plain(children.get(name))]
            if len(linears) == len(names) and _fit(linears):
                product = _Product(linears)
                for index, name in enumerate(names):
                    setattr(module, name, FusedPart(product, index))
                count += len(names)
        for name, child in children.items():
            for linear in _plain(child):
                if getattr(module, name) is linear:  # not fused
                    setattr(module, name, PackedLinear(linear))
                    count += 1
    return count


class _Packed(nn.Module):
    """A weight in oneDNN's layout. It is a buffer, so that whoever adds up a model's bytes finds it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return out


class PackedLinear(nn.Module):
    """A linear layer with a packed weight; ``weight`` gives it back dense."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = _Packed(linear.weight, linear.bias)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a copy."""
        dense: Tensor = self._packed.weight.to_dense()
        return dense

    @property
    def bias(self) -> Tensor | None:
        """``[out]``."""
        return self._packed.bias

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self._packed(inputs)
        return out


class _Product(nn.Module):
    """Several linear layers as one; the last input's outputs are kept until each was asked for."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        self._packed = _Packed(torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None)
        self._widths = [linear.out_features for linear in linears]
        self._inputs: tuple[Tensor, int] | None = None  # and its version
        self._waiting: dict[int, Tensor] = {}

    def dense(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight ``[out, in]`` and bias ``[out]`` of one of them, copies."""
        bias = self._packed.bias
        weight = torch.split(self._packed.weight.to_dense(), self._widths)[index]
        return weight, None if bias is None else torch.split(bias, self._widths)[index]

    def part(self, index: int, inputs: Tensor) -> Tensor:
        version = 0 if inputs.is_inference() else inputs._version  # inference tensors count no changes
        known = self._inputs is not None and self._inputs[0] is inputs and self._inputs[1] == version
        if not known or index not in self._waiting:
            self._inputs = inputs, version
            self._waiting = dict(enumerate(torch.split(self._packed(inputs), self._widths, dim=-1)))
        found = self._waiting.pop(index)
        if not self._waiting:
            self._inputs = None
        return found


class FusedPart(nn.Module):
    """One of several linear layers that read the same input; the first one called computes all."""

    def __init__(self, product: _Product, index: int) -> None:
        super().__init__()
        self._product, self._index = product, index

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a copy."""
        return self._product.dense(self._index)[0]

    @property
    def bias(self) -> Tensor | None:
        """``[out]``."""
        return self._product.dense(self._index)[1]

    def forward(self, inputs: Tensor) -> Tensor:
        return self._product.part(self._index, inputs)


def _plain(module: nn.Module | None) -> list[nn.Linear]:
    """The module where it is a linear layer and nothing more, in a list."""
    return [module] if isinstance(module, nn.Linear) and type(module) is nn.Linear else []


def _fit(linears: Sequence[nn.Linear]) -> bool:
    first = linears[0]
    return all(
        linear.in_features == first.in_features and (linear.bias is None) == (first.bias is None) for linear in linears
    )
