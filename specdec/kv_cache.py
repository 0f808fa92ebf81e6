"""A static KV cache that holds committed tokens and, behind them, the nodes of the tree in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.decoder_layer import find_kernels


@dataclass
class LayerBuffers:
    """Keys ``[B, H_kv, S, d_k]`` and values ``[B, H_kv, S, d_v]`` of one layer, ``S`` slots a row."""

    keys: Tensor
    values: Tensor


class KVCache:
    """Keys and values of every layer, one pair of buffers per layer, with a length per row.

    Slot ``s`` of a row holds the token at position ``s`` while ``s < length``. A pass writes its nodes behind the
    row's length; ``commit`` moves the accepted ones up to it, and the rest is dead by length: nothing is erased.
    Buffers are allocated at a layer's first write, so key and value widths are whatever the layer produces.

    Invariants: ``0 <= length <= capacity`` for every row; all buffers share batch size, capacity and device.

    Args:
        batch_size: number of rows, B.
        capacity: slots per row, S; must cover the longest row plus the largest tree.
        device: where lengths and buffers live.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self.layers: dict[int, LayerBuffers] = {}
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._host_lengths = [0] * batch_size

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return len(self._host_lengths)

    @property
    def row_lengths(self) -> list[int]:
        """Committed tokens per row, known on the host without a synchronisation."""
        return list(self._host_lengths)

    @property
    def max_length(self) -> int:
        """Length of the longest row."""
        return max(self._host_lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes the buffers take."""
        return sum(b.keys.nbytes + b.values.nbytes for b in self.layers.values())

    def write(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write the nodes of a pass behind the committed tokens and return what is to be attended to.

        Args:
            layer: layer index.
            keys: ``[B, H_kv, n, d_k]``.
            values: ``[B, H_kv, n, d_v]``.
            offset: nodes of the same tree written by earlier passes; row b's nodes go to ``length_b + offset`` on.

        Returns:
            Views of the buffers' first ``max_length + offset + n`` slots; valid until the next write or commit.

        Raises:
            ValueError: when the nodes do not fit the capacity.
        """
        if layer not in self.layers:
            self.layers[layer] = LayerBuffers(self._allocate(keys), self._allocate(values))
        return self._store(self.layers[layer], keys, values, offset)

    def _store(self, buffers: LayerBuffers, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """``write`` into given buffers."""
        num_nodes = keys.shape[2]
        end = self._end(offset + num_nodes)
        if min(self._host_lengths) == self.max_length:
            start = self.max_length + offset
            buffers.keys[:, :, start:end] = keys
            buffers.values[:, :, start:end] = values
        else:
            slots = self.lengths.unsqueeze(1) + offset + torch.arange(num_nodes, device=keys.device)
            rows = torch.arange(self.batch_size, device=keys.device).unsqueeze(1)
            buffers.keys[rows, :, slots] = keys.transpose(1, 2)
            buffers.values[rows, :, slots] = values.transpose(1, 2)
        return buffers.keys[:, :, :end], buffers.values[:, :, :end]

    def open(self, layer: int, num_nodes: int, num_heads: int, width: int, dtype: torch.dtype) -> LayerBuffers:
        """The buffers of a layer, for a kernel that writes the nodes of a pass itself.

        Args:
            layer: layer index.
            num_nodes: nodes of the tree, those of earlier passes included; they belong behind the committed tokens.
            num_heads: H_kv.
            width: of keys and of values.
            dtype: of both.

        Raises:
            ValueError: when the nodes do not fit the capacity.
        """
        self._end(num_nodes)
        if layer not in self.layers:
            like = torch.empty(self.batch_size, num_heads, 0, width, dtype=dtype, device=self.lengths.device)
            self.layers[layer] = LayerBuffers(self._allocate(like), self._allocate(like))
        return self.layers[layer]

    def _end(self, num_nodes: int) -> int:
        """The first slot behind so many nodes."""
        end = self.max_length + num_nodes
        if end > self.capacity:
            raise ValueError(f"{end} slots are needed, the cache has {self.capacity}: reserve more")
        return end

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN would still poison the row.
        batch_size, num_heads, _, width = like.shape
        return like.new_zeros(batch_size, num_heads, self.capacity, width)

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` slots behind each row's length as they lie."""
        self._set_lengths([length + count for length, count in zip(self._host_lengths, counts, strict=True)])

    def commit(self, path: Tensor, counts: Sequence[int]) -> None:
        """Keep the accepted nodes of the last pass: make them contiguous and move the lengths.

        Args:
            path: ``[B, P]`` int64, tree columns to keep, ascending; entries from ``counts[b]`` on are ignored.
            counts: number of nodes kept per row, ``0 <= counts[b] <= P``.
        """
        order = torch.arange(path.shape[1], device=path.device)
        kept = torch.tensor(counts, dtype=torch.int64, device=path.device)
        wanted = kept.unsqueeze(1) > order
        if bool((wanted & (path != order)).any()) and not self._moved(path, kept):
            base = self.lengths.unsqueeze(1)
            # A column is never left of its new place, so reading all before writing is enough; ignored entries stay.
            source = base + torch.where(wanted, path, order)
            rows = torch.arange(self.batch_size, device=path.device).unsqueeze(1)
            for buffers in self.layers.values():
                for buffer in (buffers.keys, buffers.values):
                    buffer[rows, :, base + order] = buffer[rows, :, source]
        self.advance(counts)

    def _moved(self, path: Tensor, kept: Tensor) -> bool:
        """``commit``'s moves by a compiled kernel, all layers in one call; False where that cannot be."""
        buffers = [buffer for pair in self.layers.values() for buffer in (pair.keys, pair.values)]
        alike = all(part.shape == buffers[0].shape and part.is_contiguous() for part in buffers)
        kernels = find_kernels() if alike and path.device.type == "cpu" else None
        if kernels is None:
            return False
        kernels.move_slots(buffers, self.lengths, path, kept)
        return True

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget tokens from ``lengths[b]`` on. Raises ValueError where that is beyond the row's length."""
        for row, (new, old) in enumerate(zip(lengths, self._host_lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"cannot truncate row {row} to {new} tokens: it holds {old}")
        self._set_lengths(list(lengths))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in the order given."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.lengths.device)
        for buffers in self.layers.values():
            buffers.keys, buffers.values = buffers.keys[index], buffers.values[index]
        self._set_lengths([self._host_lengths[row] for row in rows])

    def add_rows(self, count: int) -> None:
        """Append empty rows."""
        for buffers in self.layers.values():
            for name in ("keys", "values"):
                old: Tensor = getattr(buffers, name)
                setattr(buffers, name, torch.cat([old, old.new_zeros(count, *old.shape[1:])]))
        self._set_lengths(self._host_lengths + [0] * count)

    def copy_row(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Make a row hold the first ``length`` tokens of another cache's row, in place of what it holds.

        Raises:
            ValueError: when the other row holds fewer, or they do not fit the capacity.
        """
        if not 0 <= length <= source.row_lengths[source_row]:
            raise ValueError(f"row {source_row} holds {source.row_lengths[source_row]} tokens, {length} are asked for")
        if length > self.capacity:
            raise ValueError(f"{length} slots are needed, the cache has {self.capacity}: reserve more")
        for layer, theirs in source.layers.items():
            if layer not in self.layers:
                shape = (self.batch_size, -1, -1, -1)
                self.layers[layer] = LayerBuffers(
                    self._allocate(theirs.keys[:1].expand(shape)), self._allocate(theirs.values[:1].expand(shape))
                )
            mine = self.layers[layer]
            mine.keys[row, :, :length] = theirs.keys[source_row, :, :length]
            mine.values[row, :, :length] = theirs.values[source_row, :, :length]
        lengths = self.row_lengths
        lengths[row] = length
        self._set_lengths(lengths)

    def reserve(self, capacity: int) -> None:
        """Grow to at least ``capacity`` slots per row, keeping what is committed."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for buffers in self.layers.values():
            old_keys, old_values = buffers.keys, buffers.values
            buffers.keys, buffers.values = self._allocate(old_keys), self._allocate(old_values)
            buffers.keys[:, :, : old_keys.shape[2]] = old_keys
            buffers.values[:, :, : old_values.shape[2]] = old_values

    def check_integrity(self) -> None:
        """Raise RuntimeError where an invariant is broken: lengths, shapes, or a committed entry that is not finite."""
        if self.lengths.tolist() != self._host_lengths:
            raise RuntimeError(f"device lengths {self.lengths.tolist()} differ from host lengths {self._host_lengths}")
        if not all(0 <= length <= self.capacity for length in self._host_lengths):
            raise RuntimeError(f"lengths {self._host_lengths} leave [0, {self.capacity}]")
        for layer, buffers in self.layers.items():
            for name, buffer in (("keys", buffers.keys), ("values", buffers.values)):
                if buffer.shape[0] != self.batch_size or buffer.shape[2] != self.capacity:
                    raise RuntimeError(
                        f"{name} of layer {layer} are {tuple(buffer.shape)}, expected {self.batch_size} rows of "
                        f"{self.capacity} slots"
                    )
                for row, length in enumerate(self._host_lengths):
                    if not bool(buffer[row, :, :length].isfinite().all()):
                        raise RuntimeError(f"{name} of layer {layer}, row {row} hold a value that is not finite")

    def _set_lengths(self, lengths: list[int]) -> None:
        self._host_lengths = lengths
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
