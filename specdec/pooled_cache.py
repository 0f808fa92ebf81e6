"""KV caches at fixed addresses, for passes that are recorded: buffers outlive a call, and rows move within them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.layer_buffers import LayerBuffers
from specdec.segments import Share

ROUND_CAPACITY = 256
"""Slots per row are a multiple of this, so that calls of about the same length share buffers and recorded passes."""

MOST_IDLE = 2
"""Sets of buffers kept for later calls."""


class BufferPool:
    """Keys and values of some rows at fixed addresses.

    Attributes:
        recorded: what was recorded on them, by whatever key its maker has; it goes when they do.

    Args:
        rows: most rows of a cache that lies in it.
        capacity: slots per row.
        device: where they lie.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.layers: dict[int, LayerBuffers] = {}
        self.recorded: dict[Any, Any] = {}
        self.holder: weakref.ref[KVCache] | None = None

    @property
    def idle(self) -> bool:
        """Whether no cache lies in it."""
        return self.holder is None or self.holder() is None

    def buffers(self, layer: int, keys: Tensor, values: Tensor) -> LayerBuffers:
        """A layer's buffers, made where they are missing, for keys and values such as these ``[B, H_kv, n, d]``."""
        if layer not in self.layers:
            made = (x.new_zeros(self.rows, x.shape[1], self.capacity, x.shape[3]) for x in (keys, values))
            self.layers[layer] = LayerBuffers(*made)
        return self.layers[layer]


class BufferPools:
    """The pools of a target.

    Args:
        device: where buffers lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: list[BufferPool] = []

    @torch.inference_mode()
    def take(self, rows: int, capacity: int, holder: KVCache) -> BufferPool:
        """A pool with at least so much room that nobody holds; it is the holder's while that lives."""
        fits = [pool for pool in self._pools if pool.idle and pool.rows >= rows and pool.capacity >= capacity]
        if fits:
            pool = min(fits, key=lambda pool: pool.rows * pool.capacity)
            for buffers in pool.layers.values():
                buffers.keys.zero_()  # what an earlier call left must be finite wherever a kernel reads
                buffers.values.zero_()
        else:
            capacity = -(-capacity // ROUND_CAPACITY) * ROUND_CAPACITY
            pool = BufferPool(rows, capacity, self._device)
            idle = [each for each in self._pools if each.idle]
            self._pools = [each for each in self._pools if not each.idle] + idle[-(MOST_IDLE - 1) :] + [pool]
        pool.holder = weakref.ref(holder)
        return pool

    def release(self, pool: BufferPool) -> None:
        """Give a pool back before its holder ends."""
        pool.holder = None


class PooledKVCache(KVCache):
    """A KV cache in a pool's buffers: rows come and go without a change of address, and nothing waits for the device.

    Args:
        pools: where buffers come from.
        batch_size: number of rows, B.
        capacity: slots per row, rounded up.
        device: of the buffers.
    """

    most_segments = 0  # recorded passes read one place
    _lends = False  # the pool is somebody else's next

    def __init__(self, pools: BufferPools, batch_size: int, capacity: int, device: torch.device) -> None:
        super().__init__(batch_size, capacity, device)
        self._pools = pools
        self._bound = 0  # rows that ``layers`` are views of
        self._move(batch_size, capacity)

    @property
    def pool(self) -> BufferPool:
        """Where it lies now."""
        return self._pool

    @torch.inference_mode()
    def _move(self, rows: int, capacity: int) -> None:
        """Take a pool with at least so much room, and copy what is committed."""
        old, layers = getattr(self, "_pool", None), self.layers
        self._pool = self._pools.take(rows, capacity, self)
        self.capacity = self._pool.capacity
        count, self.layers = min(self.batch_size, rows), {}
        for layer, buffers in layers.items():
            new = self._pool.buffers(layer, buffers.keys, buffers.values)
            slots = min(self.capacity, buffers.keys.shape[2])
            new.keys[:count, :, :slots] = buffers.keys[:count, :, :slots]
            new.values[:count, :, :slots] = buffers.values[:count, :, :slots]
        if old is not None:
            self._pools.release(old)
        self._bound = 0
        self._set_lengths(self.row_lengths)

    def _set_lengths(self, lengths: list[int]) -> None:
        self._host_lengths = lengths
        count = len(lengths)
        if count != len(self._shares):
            self._set_shares([()] * count)
        self.lengths = self._pool.lengths[:count]
        with torch.inference_mode():
            self.lengths.copy_(upload(lengths, self.lengths.device), non_blocking=True)
        if count != self._bound:
            for layer, buffers in self._pool.layers.items():
                self.layers[layer] = LayerBuffers(buffers.keys[:count], buffers.values[:count])
            self._bound = count

    def bind(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See that a layer has its buffers, for keys and values such as these ``[B, H_kv, n, d]``."""
        if layer not in self.layers:
            whole = self._pool.buffers(layer, keys, values)
            self.layers[layer] = LayerBuffers(whole.keys[: self.batch_size], whole.values[: self.batch_size])

    def write(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """See ``KVCache.write``."""
        self.bind(layer, keys, values)
        return super().write(layer, keys, values, offset)

    def open(self, layer: int, num_nodes: int, num_heads: int, width: int, dtype: torch.dtype) -> LayerBuffers:
        """See ``KVCache.open``."""
        like = torch.empty(self.batch_size, num_heads, 0, width, dtype=dtype, device=self.lengths.device)
        self.bind(layer, like, like)
        return super().open(layer, num_nodes, num_heads, width, dtype)

    @torch.inference_mode()
    def commit(self, path: Tensor, counts: Sequence[int]) -> None:
        """See ``KVCache.commit``; accepted slots are copied wherever they lie, which asks the device nothing."""
        order = torch.arange(path.shape[1], device=path.device)
        wanted = upload(list(counts), path.device).unsqueeze(1) > order
        base = self.lengths.unsqueeze(1)
        source = base + torch.where(wanted, path, order)
        rows = torch.arange(self.batch_size, device=path.device).unsqueeze(1)
        if path.shape[1] > 1:
            for buffers in self.layers.values():
                for buffer in (buffers.keys, buffers.values):
                    buffer[rows, :, base + order] = buffer[rows, :, source]
        self.advance(counts)

    @torch.inference_mode()
    def keep_rows(self, rows: Sequence[int]) -> None:
        """See ``KVCache.keep_rows``."""
        index, lengths = upload(list(rows), self.lengths.device), [self._host_lengths[row] for row in rows]
        kept = {layer: LayerBuffers(b.keys[index], b.values[index]) for layer, b in self.layers.items()}
        if len(rows) > self._pool.rows:
            self._move(len(rows), self.capacity)
        for layer, buffers in kept.items():
            whole = self._pool.buffers(layer, buffers.keys, buffers.values)
            whole.keys[: len(rows), :, : buffers.keys.shape[2]] = buffers.keys
            whole.values[: len(rows), :, : buffers.values.shape[2]] = buffers.values
        self._set_lengths(lengths)

    @torch.inference_mode()
    def add_rows(self, count: int, capacities: Sequence[int] | None = None) -> None:
        """See ``KVCache.add_rows``."""
        self.reserve(max(capacities or [0]))
        size = self.batch_size
        if size + count > self._pool.rows:
            self._move(size + count, self.capacity)
        for buffers in self._pool.layers.values():
            buffers.keys[size : size + count].zero_()
            buffers.values[size : size + count].zero_()
        self._set_lengths(self._host_lengths + [0] * count)

    @torch.inference_mode()
    def share(self, row: int, shares: Sequence[Share]) -> None:
        """See ``KVCache.share``; all of it is copied."""
        super().share(row, shares)

    @torch.inference_mode()
    def copy_row(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """See ``KVCache.copy_row``."""
        super().copy_row(row, source, source_row, length)

    def fit(self, capacities: Sequence[int]) -> None:
        """See ``KVCache.fit``; slots are the pool's."""
        self.reserve(max(capacities, default=0))

    def reserve(self, capacity: int) -> None:
        """See ``KVCache.reserve``."""
        if capacity > self.capacity:
            self._move(self.batch_size, capacity)


class DeviceCache(KVCache):
    """The same buffers, written and read by the lengths on the device alone: what a captured pass may use.

    Args:
        cache: its buffers as they lie now.
    """

    def __init__(self, cache: PooledKVCache) -> None:
        super().__init__(cache.batch_size, cache.capacity, cache.lengths.device)
        self._cache = weakref.ref(cache)
        self.layers, self.lengths = dict(cache.layers), cache.lengths

    def write(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """As ``KVCache.write``, but it returns all slots: how many count is in the lengths."""
        if layer not in self.layers:
            cache = self._cache()
            assert cache is not None
            cache.bind(layer, keys, values)
            self.layers[layer] = cache.layers[layer]
        buffers = self.layers[layer]
        slots = self.lengths.unsqueeze(1) + offset + torch.arange(keys.shape[2], device=keys.device)
        rows = torch.arange(keys.shape[0], device=keys.device).unsqueeze(1)
        buffers.keys[rows, :, slots] = keys.transpose(1, 2)
        buffers.values[rows, :, slots] = values.transpose(1, 2)
        return buffers.keys, buffers.values


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """``[len(values)]`` int64 on a device; from pinned memory, so that the copy waits for nothing."""
    on_host = torch.tensor(list(values), dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
