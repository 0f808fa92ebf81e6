"""Batches whose rows share prefixes, and what attention over each row as one sequence is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_cases import Case, make_case
from torch import Tensor

from specdec.kernels.shared_prefix import PrefixLevel
from specdec.kernels.tree_attention import KVFormat

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PrefixCase:
    """Operands of one call; slots that nobody may read hold NaN."""

    own: Case
    levels: list[PrefixLevel]

    def operands(self) -> tuple[Any, ...]:
        """For the operation in any of its forms."""
        own = self.own
        return (
            own.query, self.levels, own.keys, own.values, own.mask, own.scale, own.softcap, own.sinks, own.storage,
        )  # fmt: skip

    def finite(self) -> PrefixCase:
        """The same with 0 for NaN, as the CPU's path needs."""
        levels = [replace(v, keys=v.keys.nan_to_num(), values=v.values.nan_to_num()) for v in self.levels]
        own = replace(self.own, keys=self.own.keys.nan_to_num(), values=self.own.values.nan_to_num())
        return PrefixCase(own, levels)

    def whole(self, row: int) -> Case:
        """One row with all its keys in one sequence: an ordinary case of tree attention."""
        own = self.own
        dtype = own.query.dtype
        parts = []
        for level in self.levels:
            for index, (first, end) in enumerate(level.ranges):
                if first <= row < end:
                    keys, values, length, storage = level.one(index)
                    parts.append([t[:, :, : int(length)] for t in storage.dense(keys, values, dtype)])
        parts.append([t[row : row + 1] for t in own.storage.dense(own.keys, own.values, dtype)])
        before = sum(keys.shape[2] for keys, _ in parts[:-1])
        mask = replace(
            own.mask,
            lengths=own.mask.lengths[row : row + 1] + before,
            ancestors=own.mask.ancestors[row : row + 1],
            depth=own.mask.depth[row : row + 1],
        )
        keys, values = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
        return replace(own, query=own.query[row : row + 1], keys=keys, values=values, mask=mask, storage=KVFormat())

    def check(self, out: Tensor, lse: Tensor) -> None:
        """The error is at most twice that of PyTorch in the same precision; the log-sum-exp is float32's."""
        assert out.dtype == self.own.query.dtype
        for row in range(len(out)):
            case = self.whole(row)
            exact, exact_lse = case.exact()
            allowed = 2.0 * float((case.same_precision().double() - exact).abs().max())
            assert float((out[row].double() - exact[0]).abs().max()) <= allowed + 1e-6  # NaN fails, too
            # A score is a sum of d products rounded to float32, of a size with the log-sum-exp.
            bound = case.query.shape[-1] * torch.finfo(torch.float32).eps * float(exact_lse.abs().max().clamp(min=1.0))
            assert float((lse[row].double() - exact_lse[0]).abs().max()) <= bound


def make_prefix_case(
    own_lengths: list[int],
    levels: list[tuple[Ranges, list[int]]],
    num_nodes: int = 3,
    prefix_page: int = 0,
    prefix_stored: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> PrefixCase:
    """Rows of ``own_lengths`` behind prefixes: per level the rows of each prefix, and its length."""
    own = make_case(own_lengths, num_nodes, seed=seed, **options)
    shape = {name: options[name] for name in ("heads", "width", "dtype", "device") if name in options}
    made = []
    for number, (ranges, lengths) in enumerate(levels, start=1):
        case = make_case(
            lengths, 1, num_tree=0, page=prefix_page, stored=prefix_stored, seed=1000 * seed + number, **shape
        )
        made.append(PrefixLevel(case.keys, case.values, case.mask.lengths, ranges, case.storage))
    return PrefixCase(own, made)


NESTED: list[tuple[Ranges, list[int]]] = [(((0, 5),), [50]), (((0, 3), (3, 4), (4, 4)), [17, 1, 9])]
"""Five rows: all behind one prefix, then three, one and no rows behind others; the fifth has no second prefix."""
