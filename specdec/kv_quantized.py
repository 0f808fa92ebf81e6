"""A KV cache in 8, 4 or 2 bits: KIVI's form (Liu et al. 2024, section 3.3), made to agree with trees.

A token at position p reads in full what stands at the last ``WINDOW`` positions and up to the end of a group; what
is before that, ``boundary(p)``, it reads quantized. So what a token sees depends on its position alone: not on the tree
it was drafted in, the pass that committed it, or what rides along, and speculation gives the text of decoding token by
token. Where nodes of a tree stand on both sides of a boundary, a group is there in both forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.kv_groups import GROUP, Groups
from specdec.registry import unknown
from specdec.segments import Segment, Share, Shares, num_tokens

if TYPE_CHECKING:
    from specdec.drafters.base import Drafter
    from specdec.target import HFTarget

WINDOW = 128
"""Positions read in full, at least; KIVI's residual length. Trees are no deeper, and prompts come in such chunks."""
SLACK = 32
"""Positions that can be taken back without computing the text anew."""
_SPARE = 64
"""Slots by which the part in full grows."""

IN_FULL = 2 * WINDOW + GROUP + SLACK + _SPARE
"""Slots in full of a row, about: its window, part of a group, what can be taken back, a prompt's chunk or a tree."""

KV_PRECISIONS = {"int8": 8, "int4": 4, "int2": 2}
"""Names ``kv=`` takes, and the bits of a number."""


def find_kv(name: str | None) -> int | None:
    """Bits by name; raises ValueError with the nearest names where there is none."""
    if name is None:
        return None
    if name not in KV_PRECISIONS:
        raise ValueError(unknown("precision of the KV cache", name, KV_PRECISIONS))
    return KV_PRECISIONS[name]


def quantize_draft_kv(drafter: Drafter, target: HFTarget, name: str) -> None:
    """Have a drafter's draft models keep their keys and values in fewer bits.

    Raises:
        ValueError: for an unknown name, or a drafter without a draft model whose cache can be quantized.
    """
    bits = find_kv(name)
    found = draft_models(drafter, target)
    if not found:
        raise ValueError(f"draft_kv={name!r} is of draft models, drafter {drafter.name!r} has none that takes it")
    for model in found:
        model.kv_bits = bits


def draft_models(drafter: Drafter, target: HFTarget) -> list[HFTarget]:
    """The models a drafter runs beside the target, with KV caches as ``HFTarget.new_cache`` makes them."""
    found = [
        value for value in vars(drafter).values() if value is not target and getattr(type(value), "quantizes_kv", False)
    ]
    return found + [model for part in drafter.parts for model in draft_models(part, target)]


def boundary(position: int) -> int:
    """Positions before it are read quantized by the token at ``position``: whole groups before its window."""
    return max(position - WINDOW, 0) // GROUP * GROUP


@dataclass(frozen=True, eq=False)
class QuantizedSegment(Segment):
    """A row of a quantized cache, for others to copy. ``layers`` holds what is in full, from ``base`` on.

    Attributes:
        groups: of each layer, one row.
        base: position of the first token in full.
    """

    groups: Mapping[int, Groups]
    base: int

    def __post_init__(self) -> None:
        pass  # its length counts what is quantized, too

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + sum(groups.num_bytes for groups in self.groups.values())

    def check_integrity(self) -> None:
        for layer, pair in self.layers.items():
            if not all(bool(part.isfinite().all()) for part in pair):
                raise RuntimeError(f"layer {layer} of a kept text holds a value that is not finite")


class QuantizedKVCache(KVCache):
    """A KV cache whose rows are quantized up to their windows; an ordinary cache holds the rest in full.

    Rows copy what they share, packed. A row can go back by ``SLACK`` tokens; further back it has not in full what it
    would read in full, and forgets its text: ``row_lengths`` then says 0.

    Invariants, beside ``KVCache``'s: a row's ``base`` is a multiple of ``GROUP`` and at most ``boundary(length)``; its
    groups before ``length`` are quantized.

    Args:
        bits: 8, 4 or 2.
        batch_size, capacity, device: as ``KVCache`` takes them.
    """

    most_segments = 1
    regular = False
    in_forms = True
    longest_pass = WINDOW

    def __init__(self, bits: int, batch_size: int, capacity: int, device: torch.device | str = "cpu") -> None:
        super().__init__(batch_size, capacity, device)
        self.bits = bits
        self._recent = KVCache(batch_size, 0, device)
        self._groups: dict[int, Groups] = {}
        self._base = [0] * batch_size

    @property
    def slots(self) -> int:
        """Tokens of a row, those quantized included."""
        return self.capacity

    @property
    def num_bytes(self) -> int:
        """Bytes of what is quantized and of what is in full."""
        return self._recent.num_bytes + sum(groups.num_bytes for groups in self._groups.values())

    @property
    def tensors(self) -> list[Tensor]:
        """See ``KVCache.tensors``."""
        return [*self._recent.tensors, *(part for groups in self._groups.values() for part in groups.parts)]

    def write(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """See ``KVCache.write``.

        Returns:
            Quantized groups decoded, then what is in full: the slots that ``visibility`` speaks of.
        """
        self._bind(layer, keys, values)
        behind = offset + keys.shape[2]
        self._make_room(behind)
        own = self._recent.write(layer, keys, values, offset)
        count = self._needed(behind)
        if count == 0:
            return own
        old = self._groups[layer].read(count, self.bits, keys.dtype)
        return torch.cat([old[0], own[0]], dim=2), torch.cat([old[1], own[1]], dim=2)

    def prepare(self, layer: int, num_nodes: int, num_heads: int, width: int, dtype: torch.dtype) -> None:
        """See that a layer has its buffers, with room for so many nodes; arguments as ``open`` has them."""
        like = torch.empty(self.batch_size, num_heads, 0, width, dtype=dtype, device=self.lengths.device)
        self._bind(layer, like, like)
        self._make_room(num_nodes)

    def _make_room(self, behind: int) -> None:
        if self.max_length + behind > self.capacity:
            raise ValueError(
                f"{self.max_length + behind} slots are needed, the cache has {self.capacity}: reserve more"
            )
        if self._recent.max_length + behind > self._recent.capacity:
            self._recent.reserve(self._recent.max_length + behind + _SPARE)

    def forms(self, depth: Tensor, offset: int) -> list[tuple[list[int], Tensor]]:
        """Boundaries that a pass's nodes have: one of each row, its least first, and the nodes there, ``[B, n]`` bool.

        Args:
            depth: ``[B, M]`` int64, of the tree's nodes.
            offset: nodes of earlier passes among them.

        Raises:
            ValueError: for a tree deeper than the window.
        """
        _check_depth(depth)
        least = [boundary(length) for length in self._host_lengths]
        further = [
            [(boundary(length + deep) - first) // GROUP for deep in row]
            for length, first, row in zip(self._host_lengths, least, depth[:, offset:].tolist(), strict=True)
        ]
        found = torch.tensor(further, device=depth.device)
        return [([first + form * GROUP for first in least], found == form) for form in range(int(found.max()) + 1)]

    def in_form(self, layer: int, borders: Sequence[int], behind: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H_kv, max_length + behind, d]``, slot s position s: quantized before each row's border.

        Nodes of earlier passes are there, what is written for those of this one goes to ``take_nodes``.
        """
        recent, (heads, width) = self._recent.layers[layer], self._groups[layer].keys.shape[1::3]
        made = [part.new_zeros(self.batch_size, heads, self.max_length + behind, width) for part in recent.parts]
        ends = [
            min(border, length // GROUP * GROUP) for border, length in zip(borders, self._host_lengths, strict=True)
        ]
        old = self._groups[layer].read(max(ends) // GROUP, self.bits, made[0].dtype) if max(ends) else made
        for part, own, quantized in zip(made, recent.parts, old, strict=True):
            for row, (end, base, length) in enumerate(zip(ends, self._base, self._host_lengths, strict=True)):
                part[row, :, :end] = quantized[row, :, :end]
                part[row, :, end : length + behind] = own[row, :, end - base : length + behind - base]
        return made[0], made[1]

    def take_nodes(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> None:
        """Write the nodes from ``offset`` on that stand behind each row's length in what ``in_form`` returned."""
        behind = keys.shape[2] - self.max_length
        for part, made in zip(self._recent.layers[layer].parts, (keys, values), strict=True):
            for row, (base, length) in enumerate(zip(self._base, self._host_lengths, strict=True)):
                nodes = made[row, :, length + offset : length + behind]
                part[row, :, length + offset - base : length + behind - base] = nodes

    def _needed(self, behind: int) -> int:
        """Groups that some node of a pass reads quantized."""
        return max(min(boundary(length + behind), length // GROUP * GROUP) for length in self._host_lengths) // GROUP

    def _bind(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._recent.bind(layer, keys, values)
        if layer not in self._groups:
            like = [part.new_zeros(1, part.shape[-3], GROUP, part.shape[-1]) for part in (keys, values)]
            self._groups[layer] = Groups.of(like[0], like[1], self.bits).resized(self.batch_size, self._room)

    @property
    def _room(self) -> int:
        return -(-self.capacity // GROUP)

    def visibility(self, depth: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """See ``KVCache.visibility``.

        Raises:
            ValueError: for a tree deeper than the window.
        """
        nodes = ancestors.shape[1]
        _check_depth(depth)
        positions = self.lengths.unsqueeze(1) + depth[:, depth.shape[1] - nodes :]
        border = ((positions - WINDOW).clamp(min=0) // GROUP * GROUP).unsqueeze(2)  # [B, n, 1]
        seen, places = self._recent.visibility(depth, ancestors)
        places = places + torch.tensor(self._base, device=depth.device).unsqueeze(1)
        old = torch.arange(self._needed(depth.shape[1]) * GROUP, device=depth.device)
        visible = torch.cat([old < border, seen & (places.unsqueeze(1) >= border)], dim=2)
        return visible, torch.cat([old.expand(self.batch_size, -1), places], dim=1)

    def advance(self, counts: Sequence[int]) -> None:
        """See ``KVCache.advance``."""
        need = max(own + count for own, count in zip(self._recent.row_lengths, counts, strict=True))
        self._recent.reserve(need)
        self._recent.advance(counts)
        self._moved_to([length + count for length, count in zip(self._host_lengths, counts, strict=True)])

    def commit(self, path: Tensor, counts: Sequence[int]) -> None:
        """See ``KVCache.commit``."""
        self._recent.commit(path, counts)
        self._moved_to([length + count for length, count in zip(self._host_lengths, counts, strict=True)])

    def _moved_to(self, lengths: list[int]) -> None:
        """Quantize groups that are whole now, and give up what no later token reads in full."""
        for row, (old, new) in enumerate(zip(self._host_lengths, lengths, strict=True)):
            first, last = old // GROUP, new // GROUP
            if first < last:
                part = slice(first * GROUP - self._base[row], last * GROUP - self._base[row])
                for layer, own in self._recent.layers.items():
                    keys, values = own.keys[row : row + 1, :, part], own.values[row : row + 1, :, part]
                    self._groups[layer].write(row, first, Groups.of(keys, values, self.bits))
        own_lengths = self._recent.row_lengths
        for row, length in enumerate(lengths):
            base = boundary(max(length - SLACK, 0))
            if base > self._base[row]:
                gone, kept = base - self._base[row], length - base
                for own in self._recent.layers.values():
                    for buffer in (own.keys, own.values):
                        buffer[row, :, :kept] = buffer[row, :, gone : gone + kept].clone()
                self._base[row], own_lengths[row] = base, kept
        self._recent.truncate(own_lengths)
        self._set_lengths(lengths)

    def truncate(self, lengths: Sequence[int]) -> None:
        """See ``KVCache.truncate``; a row that cannot go back so far holds nothing afterwards."""
        for row, (new, old) in enumerate(zip(lengths, self._host_lengths, strict=True)):
            if not 0 <= new <= old:
                raise ValueError(f"cannot truncate row {row} to {new} tokens: it holds {old}")
        kept = [new if self._base[row] <= boundary(new) else 0 for row, new in enumerate(lengths)]
        self._base = [base if length else 0 for base, length in zip(self._base, kept, strict=True)]
        self._recent.truncate([length - base for length, base in zip(kept, self._base, strict=True)])
        self._set_lengths(kept)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See ``KVCache.keep_rows``."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.lengths.device)
        self._recent.keep_rows(rows)
        self._groups = {layer: groups.select(index) for layer, groups in self._groups.items()}
        self._base = [self._base[row] for row in rows]
        self._set_shares([()] * len(rows))
        self._set_lengths([self._host_lengths[row] for row in rows])

    def add_rows(self, count: int, capacities: Sequence[int] | None = None) -> None:
        """See ``KVCache.add_rows``."""
        self.fit(capacities or ())
        size = self.batch_size + count
        self._recent.add_rows(count)
        self._groups = {layer: groups.resized(size, self._room) for layer, groups in self._groups.items()}
        self._base += [0] * count
        self._set_shares([()] * size)
        self._set_lengths(self._host_lengths + [0] * count)

    def fit(self, capacities: Sequence[int]) -> None:
        """See ``KVCache.fit``; all rows have room for the longest."""
        self.reserve(max(capacities, default=0))

    def reserve(self, capacity: int) -> None:
        """See ``KVCache.reserve``."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for layer, groups in self._groups.items():
            if groups.keys.shape[2] < self._room:
                self._groups[layer] = groups.resized(self.batch_size, self._room)

    def share(self, row: int, shares: Sequence[Share]) -> None:
        """See ``KVCache.share``: the text is copied, quantized, or left out where it cannot be cut where it is cut."""
        if num_tokens(shares) > self.capacity:
            raise ValueError(f"{num_tokens(shares)} slots are needed, the cache has {self.capacity}: reserve more")
        lengths, own_lengths = self.row_lengths, self._recent.row_lengths
        lengths[row] = own_lengths[row] = self._base[row] = 0
        for share in shares:
            segment = share.segment
            if not isinstance(segment, QuantizedSegment) or len(shares) > 1:
                raise ValueError("a quantized KV cache takes texts of quantized caches alone, each by itself")
            if segment.base <= boundary(share.tokens):
                self._copy(row, segment, share.tokens)
                self._base[row], lengths[row] = segment.base, share.tokens
                own_lengths[row] = share.tokens - segment.base
        self._recent._set_lengths(own_lengths)
        self._set_lengths(lengths)

    def _copy(self, row: int, segment: QuantizedSegment, tokens: int) -> None:
        own = tokens - segment.base
        for layer, pair in segment.layers.items():
            self._bind(layer, pair[0].unsqueeze(0), pair[1].unsqueeze(0))
        self._recent.reserve(own + _SPARE)
        for layer, (keys, values) in segment.layers.items():
            mine = self._recent.layers[layer]
            mine.keys[row, :, :own], mine.values[row, :, :own] = keys[:, :own], values[:, :own]
            theirs, count = segment.groups[layer], tokens // GROUP
            self._groups[layer].write(row, 0, Groups(*(part[:, :, :count] for part in theirs.parts)))

    def give_away(self) -> list[Shares]:
        """See ``KVCache.give_away``."""
        given = [self.beginning(row, length) for row, length in enumerate(self._host_lengths)]
        self._recent.layers, self._groups = {}, {}
        self.truncate([0] * self.batch_size)
        return given

    def beginning(self, row: int, count: int) -> Shares:
        """See ``KVCache.beginning``; all of the row is copied."""
        self._check_held(row, count)
        return (Share(self._snapshot(row), count),) if count else ()

    def _snapshot(self, row: int) -> QuantizedSegment:
        """A row's text, copied."""
        length, own = self._host_lengths[row], self._recent.row_lengths[row]
        index = torch.tensor([row], device=self.lengths.device)
        layers = {
            layer: (b.keys[row, :, :own].clone(), b.values[row, :, :own].clone())
            for layer, b in self._recent.layers.items()
        }
        groups = {
            layer: Groups(*(part[:, :, : length // GROUP].clone() for part in held.select(index).parts))
            for layer, held in self._groups.items()
        }
        return QuantizedSegment(layers, length, groups, self._base[row])

    def copy_row(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """See ``KVCache.copy_row``."""
        if not isinstance(source, QuantizedKVCache) or source.bits != self.bits:
            raise ValueError(f"a KV cache in {self.bits} bits takes rows of such caches alone")
        self.share(row, source.beginning(source_row, length))

    def check_integrity(self) -> None:
        """See ``KVCache.check_integrity``."""
        if self.lengths.tolist() != self._host_lengths:
            raise RuntimeError(f"device lengths {self.lengths.tolist()} differ from host lengths {self._host_lengths}")
        held = [base + own for base, own in zip(self._base, self._recent.row_lengths, strict=True)]
        if held != self._host_lengths or any(base % GROUP for base in self._base):
            raise RuntimeError(f"rows of {self._host_lengths} tokens hold {held}, in full from {self._base} on")
        if any(base > boundary(length) for base, length in zip(self._base, self._host_lengths, strict=True)):
            raise RuntimeError(f"rows of {self._host_lengths} tokens are in full from {self._base} on only")
        self._recent.check_integrity()


def _check_depth(depth: Tensor) -> None:
    """Raise ValueError for a tree deeper than the window."""
    if depth.shape[1] > WINDOW + 1 and int(depth.max()) > WINDOW:
        raise ValueError(f"a tree {int(depth.max())} deep does not fit the KV cache's window of {WINDOW} tokens")
