"""Random trees over random caches, in every form of storage, and what attention over them must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.tree_attention import KVFormat, TreeMask, reference


@dataclass(frozen=True)
class Case:
    """Operands of one call; ``keys`` and ``values`` hold NaN wherever no row may read."""

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: TreeMask
    storage: KVFormat
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.query.shape[-1]) ** -0.5

    def exact(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp in float64 of the operands as stored."""
        storage = self.storage
        keys, values = self.keys, self.values
        if storage.key_scales is None:
            keys, values = keys.double(), values.double()
        return reference.tree_attention_with_lse(
            self.query.double(), keys, values, self.mask, self.scale, self.softcap, self.sinks, storage
        )

    def same_precision(self) -> Tensor:
        """The output as plain PyTorch computes it in the query's type throughout."""
        dtype = self.query.dtype
        keys, values = self.storage.dense(self.keys, self.values, dtype)
        visible = self.mask.dense(keys.shape[2])
        seen = visible.any(1)[:, None, :, None]
        group = self.query.shape[1] // keys.shape[1]
        keys, values = (t.masked_fill(~seen, 0.0).repeat_interleave(group, 1) for t in (keys, values))
        scores = self.query @ keys.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
        if self.sinks is not None:
            sink = self.sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ values
        return scores.softmax(-1) @ values


def make_case(
    lengths: list[int],
    num_nodes: int,
    num_tree: int | None = None,
    heads: tuple[int, int] = (4, 2),
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    page: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Rows of ``lengths`` committed slots and a random tree of ``num_tree`` nodes, whose last ``num_nodes`` ask."""
    generator = torch.Generator().manual_seed(seed)
    num_tree = num_nodes if num_tree is None else num_tree
    batch_size, (num_heads, num_kv_heads) = len(lengths), heads
    parents = [
        [int(torch.randint(max(0, i - 5), i, (), generator=generator)) for i in range(1, num_tree)] for _ in lengths
    ]
    ancestors = torch.eye(max(num_tree, 1), dtype=torch.bool)[:num_tree, :num_tree].repeat(batch_size, 1, 1)
    for b, row in enumerate(parents):
        for child, parent in enumerate(row, start=1):
            ancestors[b, child] |= ancestors[b, parent]
    depth = ancestors.sum(-1) - 1
    queries = ancestors[:, num_tree - num_nodes :] if num_tree else ancestors.new_zeros(batch_size, num_nodes, 0)
    mask = TreeMask(torch.tensor(lengths, device=device), queries.to(device), depth.to(device), window)

    ends = [length + num_tree for length in lengths]
    num_slots = max(ends) + 3
    shape = (batch_size, num_kv_heads, num_slots, width)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    storage_type = stored or dtype
    key_scales = value_scales = None
    if stored is not None:
        (keys, key_scales), (values, value_scales) = _quantize(keys, stored), _quantize(values, stored)
        poison = 113 if stored == torch.int8 else torch.nan
    else:
        keys, values, poison = keys.to(storage_type), values.to(storage_type), torch.nan
    for b, end in enumerate(ends):
        for tensor in (keys, values):
            tensor[b, :, end:] = poison
        for scales in (key_scales, value_scales):
            if scales is not None:
                scales[b, :, end:] = torch.nan
    table = None
    if page:
        keys, values, key_scales, value_scales, table = _paged(keys, values, key_scales, value_scales, page, generator)
    query = torch.randn(batch_size, num_nodes, num_heads, width, generator=generator).transpose(1, 2).to(dtype)
    return Case(
        query.to(device),
        keys.to(device),
        values.to(device),
        mask,
        KVFormat(*(None if t is None else t.to(device) for t in (table, key_scales, value_scales))),
        softcap,
        torch.randn(num_heads, generator=generator).to(device) if sinks else None,
    )


def _quantize(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scales = numbers.abs().amax(-1) / largest
    scaled = numbers / scales.unsqueeze(-1)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def _paged(
    keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None, page: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """The same in pages that lie in random order."""
    batch_size, num_kv_heads, num_slots = keys.shape[:3]
    count = -(-num_slots // page)
    order = torch.randperm(batch_size * count, generator=generator)
    table = order.view(batch_size, count).to(torch.int32)

    def scatter(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        pages = torch.zeros(batch_size * count, num_kv_heads, page, *rows.shape[3:]).to(rows.dtype)
        for b in range(batch_size):
            for i in range(count):
                part = rows[b, :, i * page : (i + 1) * page]
                pages[int(table[b, i]), :, : part.shape[1]] = part
        return pages

    moved = [scatter(t) for t in (keys, values, key_scales, value_scales)]
    assert moved[0] is not None
    assert moved[1] is not None
    return moved[0], moved[1], moved[2], moved[3], table
