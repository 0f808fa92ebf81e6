"""Token Recycling: the target's own top candidates after each token, from the last time it was seen, form the tree."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.target import HFTarget, TargetOutput
from specdec.tree import PADDING, ROOT, TokenTree
from specdec.verifiers.base import Verdict

_RANK_WEIGHTS = (0.55, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)
"""Assumed chance that the rank-r candidate is right; only the order of their products shapes the tree."""


@dataclass(frozen=True)
class RecyclingConfig:
    """Options of Token Recycling.

    Attributes:
        candidates: tokens kept per vocabulary entry, k.
        max_nodes: most nodes of a tree, root included.
        depth: deepest node.
        keep_between_calls: start a call with what earlier ones learned.
    """

    candidates: int = 8
    max_nodes: int = 16
    depth: int = 6
    keep_between_calls: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= len(_RANK_WEIGHTS):
            raise ValueError(f"candidates must be in [1, {len(_RANK_WEIGHTS)}], got {self.candidates}")
        for name in ("max_nodes", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@cache
def tree_template(max_nodes: int, depth: int, candidates: int) -> tuple[tuple[int, int, int], ...]:
    """The static tree, level by level, as (parent, rank, depth) per node; node 0 is the root.

    Nodes are taken by the product of their ranks' weights, so better ranks get more children.
    """
    chosen: list[tuple[int, int, int]] = [(ROOT, 0, 0)]
    heap = [(-weight, 1, 0, rank) for rank, weight in enumerate(_RANK_WEIGHTS[:candidates])]
    heapq.heapify(heap)
    while heap and len(chosen) < max_nodes:
        negative, level, parent, rank = heapq.heappop(heap)
        chosen.append((parent, rank, level))
        if level < depth:
            for child_rank, weight in enumerate(_RANK_WEIGHTS[:candidates]):
                heapq.heappush(heap, (negative * weight, level + 1, len(chosen) - 1, child_rank))
    order = sorted(range(len(chosen)), key=lambda node: chosen[node][2])
    place = {node: index for index, node in enumerate(order)}
    return tuple((place.get(chosen[n][0], ROOT), chosen[n][1], chosen[n][2]) for n in order)


@cache
def by_promise(template: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The template's nodes, the most promising first, and each one's parent in that order."""
    promise: list[float] = []
    for parent, rank, level in template:
        promise.append(promise[parent] * _RANK_WEIGHTS[rank] if level else 1.0)
    order = sorted(range(len(template)), key=lambda node: -promise[node])
    place = {node: index for index, node in enumerate(order)}
    return tuple(order), tuple(place.get(template[node][0], ROOT) for node in order)


class RecyclingDrafter(Drafter):
    """Token Recycling (Luo et al. 2024): an adjacency table ``[V, k]`` refreshed by every node of every pass.

    The prompt's own bigrams fill entries that no pass has written yet.
    """

    name = "recycling"
    Config = RecyclingConfig

    def __init__(self, config: RecyclingConfig | None = None) -> None:
        self.config = config or RecyclingConfig()
        self._table = torch.empty(0, 0, dtype=torch.int64)

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        candidates = min(self.config.candidates, target.vocab_size)
        self._table = torch.full((target.vocab_size, candidates), -1, device=target.device)

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        if not self.config.keep_between_calls:
            self._table.fill_(-1)
        for row in batch.rows:
            tokens = torch.tensor(row.tokens, device=self._table.device)
            before, after = tokens[:-1], tokens[1:]
            unknown = self._table[before, 0] < 0
            self._table[before[unknown], 0] = after[unknown]

    def propose(self, batch: Batch) -> TokenTree:
        depth = min(self.config.depth, max(row.max_depth for row in batch.rows))
        template = tree_template(self.config.max_nodes, depth, self._table.shape[1]) if depth > 0 else ()
        tokens = [batch.pending.to(self._table.device).unsqueeze(1)]
        for level in range(1, depth + 1):
            start = sum(part.shape[1] for part in tokens[:-1])  # first column of the level above
            members = [(parent - start, rank) for parent, rank, at in template if at == level]
            if not members:
                break
            index, ranks = torch.tensor(members, device=self._table.device).T
            parents = tokens[-1][:, index]
            children = self._table[parents.clamp(min=0), ranks]
            tokens.append(torch.where(parents >= 0, children, -1))
        order, layout = by_promise(template) if template else ((0,), (ROOT,))
        nodes = torch.cat(tokens, dim=1)[:, list(order)]
        parents = torch.tensor(layout, device=nodes.device).expand_as(nodes)
        return TokenTree(nodes.clamp(min=0), parents.masked_fill(nodes < 0, PADDING)).compact()

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        valid = tree.valid if tree.virtual is None else tree.valid & ~tree.virtual
        best: Tensor = output.logits[valid].topk(self._table.shape[1], dim=-1).indices
        self._table[tree.tokens[valid]] = best
