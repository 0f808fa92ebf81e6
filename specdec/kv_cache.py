"""A static KV cache that holds committed tokens and, behind them, the nodes of the tree in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdec.kernels.decoder_layer import MOST_LEVELS, find_kernels
from specdec.layer_buffers import LayerAddresses, LayerBuffers
from specdec.segments import Share, Shares, address_table, distinct, extended, first_tokens, num_tokens
from specdec.slot_order import SlotOrder


class KVCache(SlotOrder):
    """Keys and values of every layer, one pair of buffers per layer, with a length per row.

    A row begins with the tokens of its shared segments, if it has any; what stands behind them is its own. Slot ``s``
    of a row's buffers holds the token at position ``shared tokens + s`` while that is below the row's length. A pass
    writes its nodes behind the row's length; ``commit`` moves the accepted ones up to it, and the rest is dead by
    length: nothing is erased. Buffers are allocated at a layer's first write, so key and value widths are whatever the
    layer produces.

    Invariants: ``shared tokens <= length <= capacity`` for every row, and what is its own fits its slots; all buffers
    share batch size, slots and device. Segments are only read: rows of many caches may refer to one.

    Args:
        batch_size: number of rows, B.
        capacity: tokens per row; must cover the longest row plus the largest tree. ``fit`` tells rows apart.
        device: where lengths and buffers live.
    """

    most_segments = MOST_LEVELS
    """Segments a row can refer to; what stands in further ones is copied."""
    _lends = True  # buffers may live on as segments

    def __init__(self, batch_size: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self._fitted: list[int] | None = None  # each row's capacity; None where all have the cache's
        self._own: Tensor | None = None  # lengths, where rows share something
        self._set_shares([()] * batch_size)
        self._addresses: LayerAddresses | None = None  # of those asked for last
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
    def shares(self) -> list[Shares]:
        """Each row's use of shared segments."""
        return list(self._shares)

    @property
    def shares_segments(self) -> bool:
        """Whether a row refers to a segment."""
        return self._sharing

    @property
    def own_lengths(self) -> Tensor:
        """``[B]`` int64, committed tokens in the rows' own buffers."""
        if not self._sharing:
            return self.lengths
        if self._own is None:
            self._own = torch.tensor(self._host_own, dtype=torch.int64, device=self.lengths.device)
        return self._own

    @property
    def slots(self) -> int:
        """Slots of a row's own buffers, S; before the first write, what they will have."""
        for buffers in self.layers.values():
            return buffers.keys.shape[2]
        return self._planned

    @property
    def _planned(self) -> int:
        """Slots that suffice for all rows' capacities."""
        each = zip(self._capacities, self._shared, strict=True)
        return max((capacity - shared for capacity, shared in each), default=self.capacity)

    @property
    def _capacities(self) -> list[int]:
        return [self.capacity] * self.batch_size if self._fitted is None else self._fitted

    @property
    def room(self) -> int:
        """Nodes of a tree that fit behind every row as it is."""
        return self.slots - max(self._host_own, default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes the buffers take, and the segments, each counted once."""
        own = sum(buffers.num_bytes for buffers in self.layers.values())
        return own + sum(segment.num_bytes for segment in distinct(self._shares))

    @property
    def tensors(self) -> list[Tensor]:
        """All that hold keys and values, those of segments included; some may be views of the same memory."""
        pairs = [buffers.parts for buffers in self.layers.values()]
        pairs += [pair for segment in distinct(self._shares) for pair in segment.layers.values()]
        return [part for pair in pairs for part in pair]

    @property
    def _host_own(self) -> list[int]:
        return [length - shared for length, shared in zip(self._host_lengths, self._shared, strict=True)]

    def write(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write the nodes of a pass behind the committed tokens and return what is to be attended to.

        Args:
            layer: layer index.
            keys: ``[B, H_kv, n, d_k]``.
            values: ``[B, H_kv, n, d_v]``.
            offset: nodes of the same tree written by earlier passes; row b's nodes go to ``length_b + offset`` on.

        Returns:
            Keys and values at positions ``0 .. max_length + offset + n``: views of the buffers, or copies where rows
            share segments; valid until the next write or commit.

        Raises:
            ValueError: when the nodes do not fit the capacity.
        """
        own = self.write_own(layer, keys, values, offset)
        return self._whole(layer, own, offset + keys.shape[2]) if self._sharing else own

    def write_own(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """``write`` that returns what stands behind the rows' segments only: views of the buffers' first slots."""
        if layer not in self.layers:
            self.layers[layer] = LayerBuffers(self._allocate(keys), self._allocate(values))
        return self._store(self.layers[layer], keys, values, offset)

    def _store(self, buffers: LayerBuffers, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """``write`` into given buffers."""
        num_nodes = keys.shape[2]
        end = self._end(offset + num_nodes)
        own = self._host_own
        if min(own) == max(own):
            start = own[0] + offset
            buffers.keys[:, :, start:end] = keys
            buffers.values[:, :, start:end] = values
        else:
            slots = self.own_lengths.unsqueeze(1) + offset + torch.arange(num_nodes, device=keys.device)
            rows = torch.arange(self.batch_size, device=keys.device).unsqueeze(1)
            buffers.keys[rows, :, slots] = keys.transpose(1, 2)
            buffers.values[rows, :, slots] = values.transpose(1, 2)
        return buffers.keys[:, :, :end], buffers.values[:, :, :end]

    def _whole(self, layer: int, own: tuple[Tensor, Tensor], behind: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values at every row's positions, ``behind`` nodes included, gathered for one pass."""
        gathered = []
        for part, buffer in enumerate(own):
            whole = buffer.new_zeros(*buffer.shape[:2], self.max_length + behind, buffer.shape[3])
            for row, (shares, length) in enumerate(zip(self._shares, self._host_own, strict=True)):
                at = 0
                for share in shares:
                    whole[row, :, at : at + share.tokens] = share.entries(layer)[part]
                    at += share.tokens
                whole[row, :, at : at + length + behind] = buffer[row, :, : length + behind]
            gathered.append(whole)
        return gathered[0], gathered[1]

    def entries(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, length, d]`` of a row's committed tokens, gathered."""
        own, cut = self._host_own[row], [share.entries(layer) for share in self._shares[row]]
        if own:
            cut.append(self.layers[layer].first(row, own))
        return torch.cat([keys for keys, _ in cut], dim=1), torch.cat([values for _, values in cut], dim=1)

    def segment_table(self, layer: int) -> Tensor | None:
        """``[B, levels, 4]`` int64 as ``Kernels.attention`` takes it; None where no row shares anything."""
        if not self._sharing:
            return None
        if layer not in self._tables:
            self._tables[layer] = address_table(self._shares, layer)
        return self._tables[layer]

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

    def open_all(
        self, layers: Sequence[int], num_nodes: int, num_heads: int, width: int, dtype: torch.dtype
    ) -> list[LayerBuffers]:
        """``open`` for several layers."""
        known = self.layers
        if not all(layer in known for layer in layers):
            return [self.open(layer, num_nodes, num_heads, width, dtype) for layer in layers]
        self._end(num_nodes)
        return [known[layer] for layer in layers]

    def addresses(self, layers: Sequence[LayerBuffers]) -> LayerAddresses:
        """Where some layers' buffers lie."""
        if self._addresses is None or not self._addresses.hold(layers):
            self._addresses = LayerAddresses(layers)
        return self._addresses

    def _end(self, num_nodes: int) -> int:
        """The first slot behind so many nodes."""
        end = max(self._host_own) + num_nodes
        if end > self.slots:
            raise ValueError(f"{end} slots are needed, the cache has {self.slots}: reserve more")
        return end

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN would still poison the row.
        batch_size, num_heads, _, width = like.shape
        return like.new_zeros(batch_size, num_heads, self.slots, width)

    def bind(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See that a layer has its buffers, for keys and values such as these ``[.., H_kv, n, d]``."""
        if layer not in self.layers:
            wide = (part.expand(self.batch_size, *part.shape[-3:]) for part in (keys, values))
            self.layers[layer] = LayerBuffers(*map(self._allocate, wide))

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` slots behind each row's length as they lie."""
        self._set_lengths([length + count for length, count in zip(self._host_lengths, counts, strict=True)])

    def commit(self, path: Tensor, counts: Sequence[int]) -> None:
        """Keep the accepted nodes of the last pass: make them contiguous and move the lengths.

        Args:
            path: ``[B, P]`` int64, tree columns to keep, ascending; entries from ``counts[b]`` on are ignored.
            counts: number of nodes kept per row, ``0 <= counts[b] <= P``.
        """
        if self._in_place(path, counts):
            self.advance(counts)
            return
        order = torch.arange(path.shape[1], device=path.device)
        kept = torch.tensor(counts, dtype=torch.int64, device=path.device)
        if not self._moved(path, kept):
            wanted = kept.unsqueeze(1) > order
            base = self.own_lengths.unsqueeze(1)
            # A column is never left of its new place, so reading all before writing is enough; ignored entries stay.
            source = base + torch.where(wanted, path, order)
            rows = torch.arange(self.batch_size, device=path.device).unsqueeze(1)
            for buffers in self.layers.values():
                for buffer in buffers.parts:
                    buffer[rows, :, base + order] = buffer[rows, :, source]
        self.advance(counts)

    @staticmethod
    def _in_place(path: Tensor, counts: Sequence[int]) -> bool:
        """Whether the columns that are kept are the first ones."""
        if path.device.type == "cpu":
            return all(row[:count] == list(range(count)) for row, count in zip(path.tolist(), counts, strict=True))
        order = torch.arange(path.shape[1], device=path.device)
        wanted = torch.tensor(counts, device=path.device).unsqueeze(1) > order
        return not bool((wanted & (path != order)).any())

    def _moved(self, path: Tensor, kept: Tensor) -> bool:
        """``commit``'s moves by a compiled kernel, all layers in one call; False where that cannot be."""
        kernels, layers = find_kernels() if path.device.type == "cpu" else None, list(self.layers.values())
        if kernels is None or not layers:
            return False
        addresses = self.addresses(layers)
        if addresses.alike:
            kernels.move_slots(addresses.keys, 2 * len(layers), layers[0].keys, self.own_lengths, path, kept)
        return addresses.alike

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget tokens from ``lengths[b]`` on; where that is within a segment, the row uses less of it from now on.

        Raises:
            ValueError: where that is beyond the row's length.
        """
        for row, (new, old) in enumerate(zip(lengths, self._host_lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"cannot truncate row {row} to {new} tokens: it holds {old}")
        if self._sharing:
            rows = zip(self._shares, lengths, strict=True)
            self._set_shares([first_tokens(shares, length) for shares, length in rows])
        self._set_lengths(list(lengths))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in the order given."""
        own = self._host_own
        if self._fitted is not None:
            self._fitted = [self._fitted[row] for row in rows]
        self._set_shares([self._shares[row] for row in rows])
        self._set_lengths([self._host_lengths[row] for row in rows])
        # Rows that are gone may have needed longer buffers than those that stay.
        slots = max([self._planned, *(own[row] for row in rows)])
        for buffers in self.layers.values():
            buffers.keep_rows(rows, slots)

    def add_rows(self, count: int, capacities: Sequence[int] | None = None) -> None:
        """Append empty rows, with capacities of their own, or the cache's."""
        if capacities is not None or self._fitted is not None:
            self._fitted = [*self._capacities, *([self.capacity] * count if capacities is None else capacities)]
            self.capacity = max(self.capacity, *self._fitted)
        for buffers in self.layers.values():
            buffers.add_rows(count)
        self._set_shares([*self._shares, *([()] * count)])
        self._set_lengths(self._host_lengths + [0] * count)

    def take_rows(self, other: KVCache) -> None:
        """Append the rows of another cache, copied."""
        size, lengths = self.batch_size, other.row_lengths
        self.reserve(other.capacity)
        self.add_rows(len(lengths))
        for row, length in enumerate(lengths):
            self.copy_row(size + row, other, row, length)

    def share(self, row: int, shares: Sequence[Share]) -> None:
        """Make a row hold the tokens of segments, in place of what it holds.

        The row refers to the first ``most_segments`` of them; further ones are copied.

        Raises:
            ValueError: where they do not fit the capacity.
        """
        if num_tokens(shares) > self.capacity:
            raise ValueError(f"{num_tokens(shares)} slots are needed, the cache has {self.capacity}: reserve more")
        referred, copied = tuple(shares[: self.most_segments]), shares[self.most_segments :]
        if referred or self._shares[row]:
            self._set_shares([*self._shares[:row], referred, *self._shares[row + 1 :]])
        lengths = self.row_lengths
        lengths[row] = num_tokens(referred)
        self._set_lengths(lengths)
        for each in copied:
            self._append(row, each.segment.layers, each.tokens)

    def _append(self, row: int, layers: Mapping[int, tuple[Tensor, Tensor]], count: int) -> None:
        """Copy the first ``count`` tokens of ``[H_kv, slots, d]`` behind what a row holds, and commit them."""
        if not count:
            return
        start = self._host_own[row]
        for layer, (keys, values) in layers.items():
            self.bind(layer, keys.unsqueeze(0), values.unsqueeze(0))
        if start + count > self.slots:
            self._grow(max(start + count, self._planned))
        for layer, (keys, values) in layers.items():
            mine = self.layers[layer]
            mine.keys[row, :, start : start + count] = keys[:, :count]
            mine.values[row, :, start : start + count] = values[:, :count]
        lengths = self.row_lengths
        lengths[row] += count
        self._set_lengths(lengths)

    def give_away(self) -> list[Shares]:
        """Turn what every row holds into shares for other caches to refer to; this one is empty afterwards."""
        own = self._host_own
        lent: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in own]
        lends = self._lends and own == [self.slots]
        for layer in [*self.layers]:
            buffers = self.layers.pop(layer)
            for row, count in enumerate(own):
                if count:
                    # The only row as it is where it is full: a view of one of several would keep all alive.
                    lent[row][layer] = buffers.first(row, count, copy=not lends)
        given = [extended(*each) for each in zip(self._shares, lent, own, strict=True)]
        self._set_shares([()] * self.batch_size)
        self._set_lengths([0] * self.batch_size)
        return given

    def beginning(self, row: int, count: int) -> Shares:
        """A row's first tokens for other caches to refer to: segments that it refers to itself, and its own, copied.

        Raises:
            ValueError: when the row holds fewer.
        """
        self._check_held(row, count)
        shares = first_tokens(self._shares[row], count)
        own = count - num_tokens(shares)
        return extended(shares, {layer: each.first(row, own, copy=True) for layer, each in self.layers.items()}, own)

    def _check_held(self, row: int, count: int) -> None:
        if not 0 <= count <= self._host_lengths[row]:
            raise ValueError(f"row {row} holds {self._host_lengths[row]} tokens, {count} are asked for")

    def copy_row(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Make a row hold the first ``length`` tokens of another cache's row, in place of what it holds.

        Segments of that row are referred to, what is its own is copied.

        Raises:
            ValueError: when the other row holds fewer, or they do not fit the capacity.
        """
        source._check_held(source_row, length)
        if length > self.capacity:
            raise ValueError(f"{length} slots are needed, the cache has {self.capacity}: reserve more")
        shares = first_tokens(source._shares[source_row], length)
        own = {layer: (theirs.keys[source_row], theirs.values[source_row]) for layer, theirs in source.layers.items()}
        self.share(row, shares)
        self._append(row, own, length - num_tokens(shares))

    def fit(self, capacities: Sequence[int]) -> None:
        """Say how many tokens each row needs room for; the one with most behind its segments decides all rows' slots.

        Where it has to be known, it is said before the first write: buffers grow, and shrink when rows leave only.
        """
        self._fitted, self.capacity = list(capacities), max(capacities, default=self.capacity)
        self._grow_to_plan()

    def reserve(self, capacity: int) -> None:
        """Grow to at least ``capacity`` tokens per row, keeping what is committed."""
        self.capacity = max(self.capacity, capacity)
        if self._fitted is not None:
            self._fitted = [max(each, capacity) for each in self._fitted]
        self._grow_to_plan()

    def make_room(self, nodes: int) -> None:
        """Grow, where that is needed, to so many tokens behind what each row holds."""
        if nodes <= self.room:
            return
        if self._sharing or self._fitted is not None:
            each = zip(self._capacities, self._host_lengths, strict=True)
            self.fit([max(capacity, length + nodes) for capacity, length in each])
        else:
            self.reserve(self.max_length + nodes)

    def _grow_to_plan(self) -> None:
        if self._planned > self.slots:
            self._grow(self._planned)

    def _grow(self, slots: int) -> None:
        """Give every row's buffers so many slots."""
        for buffers in self.layers.values():
            buffers.grow(slots)

    def check_integrity(self) -> None:
        """Raise RuntimeError where an invariant is broken: lengths, shapes, or a committed entry that is not finite."""
        if self.lengths.tolist() != self._host_lengths:
            raise RuntimeError(f"device lengths {self.lengths.tolist()} differ from host lengths {self._host_lengths}")
        if not all(0 <= length <= self.capacity for length in self._host_lengths):
            raise RuntimeError(f"lengths {self._host_lengths} leave [0, {self.capacity}]")
        own = self._host_own
        if min(own, default=0) < 0 or (self.layers and max(own) > self.slots):
            raise RuntimeError(f"lengths {self._host_lengths}, {self._shared} of them shared, leave {self.slots} slots")
        for segment in distinct(self._shares):
            segment.check_integrity()
        for layer, buffers in self.layers.items():
            buffers.check_integrity(layer, self.slots, own)

    def _set_shares(self, shares: Sequence[Shares]) -> None:
        """What rows share; whoever changes it sets the lengths next."""
        self._shares, self._shared = list(shares), [num_tokens(each) for each in shares]
        self._sharing = any(self._shared)
        self._tables: dict[int, Tensor] = {}  # of segments, for compiled kernels
        self._own = None

    def _set_lengths(self, lengths: list[int]) -> None:
        self._host_lengths, self._own = lengths, None
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
