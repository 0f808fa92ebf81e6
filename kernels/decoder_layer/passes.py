"""What the layers of a pass are given beside their weights: the rows of each cache, and what follows them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specdec.kernels.decoder_layer.structures import LayerArguments, Linear, PassArguments

MOST_LEVELS = 8
"""Of segments that rows share."""


@dataclass(frozen=True)
class PassPart:
    """Rows of one cache in a pass.

    Attributes:
        arguments: what their layers share.
        keys: address of the addresses of each layer's, as ``Kernels.attention`` takes them.
        values: the same.
        slots: of a row there.
        segments: each layer's, likewise; None where rows share nothing.
    """

    arguments: PassArguments
    keys: int
    values: int
    slots: int
    segments: Sequence[Tensor] | None = None

    def fill(self) -> Any:
        """Set the layers' addresses in ``arguments``; those of segments are good as long as what is returned."""
        arguments, segments = self.arguments, self.segments
        tables = None if segments is None else array_of([table.data_ptr() for table in segments])
        arguments.keys, arguments.values = self.keys, self.values
        arguments.segments, arguments.next = None if tables is None else ctypes.addressof(tables), None
        arguments.slots = self.slots
        arguments.levels = 0 if segments is None else levels_of(segments[0])
        return tables


class LayerTable:
    """Layers of one size in sequence, as ``Kernels.layers`` reads them."""

    def __init__(self, layers: Sequence[LayerArguments]) -> None:
        self.layers = list(layers)
        self.addresses = array_of([ctypes.addressof(layer) for layer in layers])


@dataclass(frozen=True)
class PassEnd:
    """What follows the layers in the same call.

    Attributes:
        norm: ``[d]`` factors of an RMSNorm.
        eps: its epsilon.
        head: an output head that reads as many channels as the layers; None for none.
        shape: ``(B, N)`` of the logits, where they are not as the nodes are.
        places: ``[T]`` int64, where among these B * N the T nodes' stand; what is between them is undefined.
    """

    norm: Tensor
    eps: float
    head: Linear | None = None
    shape: tuple[int, int] | None = None
    places: Tensor | None = None


def array_of(addresses: Sequence[int | None]) -> Any:
    """A C array of addresses."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


def levels_of(segments: Tensor | None) -> int:
    """Of segments ``[B, levels, 4]`` that rows share; raises ValueError for more than ``MOST_LEVELS``."""
    if segments is None:
        return 0
    levels = segments.shape[1]
    if levels > MOST_LEVELS:
        raise ValueError(f"a row can share {MOST_LEVELS} segments at most, got {levels}: copy the last ones")
    return levels
