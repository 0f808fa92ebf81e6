"""One layer's keys and values in a KV cache: rows of slots, which come, go and get longer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from specdec.kernels.decoder_layer import array_of


@dataclass
class LayerBuffers:
    """Keys ``[B, H_kv, S, d_k]`` and values ``[B, H_kv, S, d_v]`` of one layer, ``S`` slots a row."""

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        self._find_addresses()

    def _find_addresses(self) -> None:
        self.addresses = self.keys.data_ptr(), self.values.data_ptr()

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.keys, self.values

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def first(self, row: int, count: int, copy: bool = False) -> tuple[Tensor, Tensor]:
        """A row's first slots ``[H_kv, count, d]``: views, which keep all rows' memory, or copies, contiguous."""
        keys, values = (part[row, :, :count] for part in self.parts)
        if copy:
            keys, values = (part.clone(memory_format=torch.contiguous_format) for part in (keys, values))
        return keys, values

    def grow(self, slots: int) -> None:
        """Give every row so many slots; what is there keeps its own."""

        def longer(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], slots, old.shape[3])
            new[:, :, : old.shape[2]] = old
            return new

        self._replace(longer)

    def keep_rows(self, rows: Sequence[int], slots: int) -> None:
        """Drop all rows but these, in the order given, and slots beyond so many.

        Rows that only fill the gaps of those dropped are copied alone, until half of the memory would lie idle.
        """
        count = len(rows)
        moves = [(place, row) for place, row in enumerate(rows) if place != row]
        fill = self.keys.shape[2] == slots and all(row >= count for _, row in moves) and 2 * count > self._rows_held

        def kept(old: Tensor) -> Tensor:
            if not fill:
                return old[torch.tensor(list(rows), dtype=torch.int64, device=old.device), :, :slots]
            for place, row in moves:
                old[place] = old[row]
            return old[:count]

        self._replace(kept)

    @property
    def _rows_held(self) -> int:
        """Rows that the memory has room for, those dropped at the end included."""
        row = self.keys[:1].nbytes
        return self.keys.untyped_storage().nbytes() // row if row else 0

    def add_rows(self, count: int) -> None:
        """Append rows of zeros."""
        self._replace(lambda old: torch.cat([old, old.new_zeros(count, *old.shape[1:])]))

    def _replace(self, make: Callable[[Tensor], Tensor]) -> None:
        # One after the other, so that no more than one of them is there twice.
        self.keys = make(self.keys)
        self.values = make(self.values)
        self._find_addresses()

    def check_integrity(self, layer: int, slots: int, lengths: Sequence[int]) -> None:
        """Raise RuntimeError where rows or slots are not as many as they should be, or an entry is not finite."""
        for name, buffer in (("keys", self.keys), ("values", self.values)):
            if buffer.shape[0] != len(lengths) or buffer.shape[2] != slots:
                raise RuntimeError(
                    f"{name} of layer {layer} are {tuple(buffer.shape)}, expected {len(lengths)} rows of {slots} slots"
                )
            for row, length in enumerate(lengths):
                if not bool(buffer[row, :, :length].isfinite().all()):
                    raise RuntimeError(f"{name} of layer {layer}, row {row} hold a value that is not finite")


class LayerAddresses:
    """Where the buffers of some layers lie, for kernels: good as long as none of them is replaced.

    Attributes:
        keys: address of the addresses of the layers' keys.
        values: the same of their values, which stand behind them.
        alike: whether all of these buffers, keys and values, have one shape and dtype and no gaps.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: Sequence[LayerBuffers]) -> None:
        self._of = [pair.addresses for pair in layers]
        self._held = array_of([key for key, _ in self._of] + [value for _, value in self._of])
        self.keys = ctypes.addressof(self._held)
        self.values = self.keys + ctypes.sizeof(self._held) // 2
        parts = [part for pair in layers for part in pair.parts]
        first = parts[0]
        self.alike = all(
            part.shape == first.shape and part.dtype == first.dtype and part.is_contiguous() for part in parts
        )

    def hold(self, layers: Sequence[LayerBuffers]) -> bool:
        """Whether they are these layers', and where they were."""
        return len(layers) == len(self._of) and all(map(is_, (pair.addresses for pair in layers), self._of))
