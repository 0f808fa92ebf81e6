"""Keys and values that rows of KV caches hold in common: computed once, kept once, read by all that need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of a text in every layer. It is never written to, and lives as long as somebody refers to it.

    Attributes:
        layers: keys ``[H_kv, slots, d_k]`` and values ``[H_kv, slots, d_v]`` of each layer, contiguous.
        length: tokens, the first so many slots.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    length: int

    def __post_init__(self) -> None:
        for layer, pair in self.layers.items():
            for part in pair:
                if part.dim() != 3 or part.shape[1] < self.length or not part.is_contiguous():
                    raise ValueError(
                        f"layer {layer} of a segment of {self.length} tokens is {tuple(part.shape)} with strides "
                        f"{part.stride()}, expected [H_kv, slots, d], contiguous, with a slot for every token"
                    )

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())

    def check_integrity(self) -> None:
        """Raise RuntimeError where a token's entry is not finite."""
        for layer, pair in self.layers.items():
            if not all(bool(part[:, : self.length].isfinite().all()) for part in pair):
                raise RuntimeError(f"layer {layer} of a shared segment holds a value that is not finite")


@dataclass(frozen=True)
class Share:
    """What a row uses of a segment: its first tokens.

    Raises:
        ValueError: for no tokens, or more than the segment has.
    """

    segment: Segment
    tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.tokens <= self.segment.length:
            raise ValueError(f"a row can use 1 to {self.segment.length} tokens of the segment, got {self.tokens}")

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, tokens, d]`` of a layer."""
        keys, values = self.segment.layers[layer]
        return keys[:, : self.tokens], values[:, : self.tokens]


Shares = tuple[Share, ...]
"""A row's, in the order of the text: the first begins at position 0, each other one where the one before it ends."""


def num_tokens(shares: Iterable[Share]) -> int:
    """Tokens of a row's shares together."""
    return sum(share.tokens for share in shares)


def first_tokens(shares: Sequence[Share], count: int) -> Shares:
    """The shares of a text's first tokens; all of them where they have no more."""
    found: list[Share] = []
    for share in shares:
        if count <= 0:
            break
        found.append(share if share.tokens <= count else Share(share.segment, count))
        count -= share.tokens
    return tuple(found)


def extended(shares: Shares, layers: Mapping[int, tuple[Tensor, Tensor]], count: int) -> Shares:
    """Shares, and behind them all of a segment of their own of so many tokens, if any."""
    return (*shares, Share(Segment(layers, count), count)) if count else shares


def distinct(rows: Iterable[Sequence[Share]]) -> list[Segment]:
    """The segments that rows refer to, each once."""
    return list({id(share.segment): share.segment for shares in rows for share in shares}.values())


def runs(rows: Sequence[Sequence[Share]]) -> list[tuple[Share, int, int]]:
    """What neighbouring rows use alike, each once for all of them, with their first row and the one past the last."""
    found: list[tuple[Share, int, int]] = []
    for level in range(max((len(shares) for shares in rows), default=0)):
        first = 0
        for row in range(1, len(rows) + 1):
            last, this = rows[row - 1][level : level + 1], rows[row][level : level + 1] if row < len(rows) else None
            if this is None or tuple(last) != tuple(this):
                if last:
                    found.append((last[0], first, row))
                first = row
    return found


def address_table(rows: Sequence[Sequence[Share]], layer: int) -> Tensor:
    """``[B, levels, 4]`` int64: where a layer's keys and values of each row's shares lie, their tokens, their slots.

    The layout is that of ``Kernels.attention``; rows with fewer shares than others end in zeros.
    """
    levels = max(len(shares) for shares in rows)
    table = []
    for shares in rows:
        used = [(*share.segment.layers[layer], share.tokens) for share in shares]
        filled = [[keys.data_ptr(), values.data_ptr(), count, keys.shape[1]] for keys, values, count in used]
        table.append(filled + [[0] * 4] * (levels - len(filled)))
    return torch.tensor(table, dtype=torch.int64)
