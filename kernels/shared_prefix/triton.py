"""Attention with shared prefixes in Triton: tree attention's kernel per level and for the rows' own keys, one merge."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec.kernels.shared_prefix import flash
from specdec.kernels.shared_prefix.prefix import PrefixLevel
from specdec.kernels.tree_attention import KVFormat, TreeMask
from specdec.kernels.tree_attention.storage import PLAIN
from specdec.kernels.tree_attention.triton import Launch, Parts


def shared_prefix_with_lse(
    query: Tensor,
    levels: Sequence[PrefixLevel],
    keys: Tensor,
    values: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    storage: KVFormat = PLAIN,
) -> tuple[Tensor, Tensor]:
    """See ``specdec.kernels.shared_prefix.shared_prefix_with_lse``; all levels' parts are merged by one kernel."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    levels = [level for level in levels if level.max_rows > 0]
    by_flash = [level for level in levels if flash.serves(query, level)]
    launches = [
        Launch(
            level.keys, level.values, level.storage, level.lengths32, row_ranges=level.row_ranges,
            max_rows=level.max_rows,
        )
        for level in levels
        if level not in by_flash
    ]  # fmt: skip
    if storage.num_slots(keys) > 0:
        launches.append(Launch(keys, values, storage, mask.lengths32, mask if mask.num_tree else None))
    splits = [launch.splits(query) for launch in launches]
    parts = Parts.allocate(max(len(by_flash) + sum(splits), 1), query, values.shape[-1])
    place = 0
    for level in by_flash:
        flash.attend(query, level, scale, softcap, parts.out[place], parts.lse[place])
        place += 1
    for launch, count in zip(launches, splits, strict=True):
        launch.run(query, parts.out, parts.lse, scale, softcap, None, count, place)
        place += count
    return parts.merge(query.dtype, sinks)
