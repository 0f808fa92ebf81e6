"""The token tree a drafter proposes and the target checks in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from specdec.kernels.trees import count_drafts, is_tree, keep_best, standing, tree_shape

ROOT = -1
"""Parent index of the root node."""
PADDING = -2
"""Parent index of a padding node: attends only to itself, is never accepted."""

SiblingSampling = Literal["deterministic", "with_replacement", "without_replacement"]
"""How the children of a node were chosen: a function of the context alone, or drawn from the draft distribution."""


@dataclass(frozen=True)
class TokenTree:
    """A batch of token trees, one per row, each rooted at the row's pending token in column 0.

    The pending token is emitted already and not yet in the KV cache. Parents stand before their children; padding
    nodes may stand anywhere but in column 0. Columns stand in order of promise where a drafter knows one: of a tree
    that is too large for a pass, the first ones are checked.

    Attributes:
        tokens: token ids, ``[B, N]`` int64. The value at padding and virtual nodes is ignored.
        parents: column of each node's parent, ``[B, N]`` int64; ``ROOT`` in column 0, ``PADDING`` for padding.
        virtual: ``[B, N]`` bool, nodes that carry an embedding instead of a token. They are attended to like any
            node, never accepted, never committed. None when there are none.
        embeddings: ``[B, N, d]``, read where ``virtual`` is set.
        draft_log_probs: ``[B, N, V]`` float32, at each node the draft distribution its children were drawn from.
            None means that children are deterministic proposals.
        siblings: how the children of a node were chosen.
        confidence: ``[B, N]`` float, the drafter's own estimate of the chance that a node is accepted, 1 at the root;
            None where it has none. Nothing is accepted by it.
    """

    tokens: Tensor
    parents: Tensor
    virtual: Tensor | None = None
    embeddings: Tensor | None = None
    draft_log_probs: Tensor | None = None
    siblings: SiblingSampling = "deterministic"
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.parents.shape or self.tokens.shape[1] == 0:
            raise ValueError(
                f"tokens and parents must both be [B, N] with N >= 1, got {tuple(self.tokens.shape)} and "
                f"{tuple(self.parents.shape)}"
            )
        if (self.virtual is None) != (self.embeddings is None):
            raise ValueError("virtual nodes need embeddings, and embeddings need a mask of virtual nodes")
        if self.siblings != "deterministic" and self.draft_log_probs is None:
            raise ValueError(f"siblings={self.siblings!r} needs draft_log_probs: the distribution they were drawn from")

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return self.tokens.shape[0]

    @property
    def num_nodes(self) -> int:
        """Number of columns, N, padding included."""
        return self.tokens.shape[1]

    @cached_property
    def valid(self) -> Tensor:
        """``[B, N]`` bool: not padding."""
        return self.parents != PADDING

    @cached_property
    def acceptable(self) -> Tensor:
        """``[B, N]`` bool: draft nodes that a verifier may accept, so neither root, padding nor virtual."""
        draft = self.parents >= 0
        return draft if self.virtual is None else draft & ~self.virtual

    @cached_property
    def _shape(self) -> tuple[Tensor, Tensor]:
        return tree_shape(self.parents)

    @property
    def ancestors(self) -> Tensor:
        """``[B, N, N]`` bool: entry ``[b, i, j]`` is set where j is i or an ancestor of i."""
        return self._shape[0]

    @property
    def depth(self) -> Tensor:
        """``[B, N]`` int64: edges from the root; 0 for padding."""
        return self._shape[1]

    @cached_property
    def draft_depth(self) -> Tensor:
        """``[B]`` int64: depth of the deepest node a verifier may accept."""
        return (self.depth * self.acceptable).amax(1)

    @cached_property
    def num_drafted(self) -> Tensor:
        """``[B]`` int64: draft nodes a verifier may accept."""
        return self.acceptable.sum(-1)

    @cached_property
    def drafts(self) -> list[tuple[int, int]]:
        """Per row the draft nodes a verifier may accept and the depth of the deepest of them."""
        if self.virtual is None:
            return [(drafted, deepest) for drafted, deepest in count_drafts(self.parents, self.depth)]
        return list(zip(self.num_drafted.tolist(), self.draft_depth.tolist(), strict=True))

    @cached_property
    def sizes(self) -> list[int]:
        """Nodes of each row but padding."""
        return [len(row) - row.count(PADDING) for row in self.parents.tolist()]

    @cached_property
    def row_sizes(self) -> list[int] | None:
        """``sizes`` where padding stands at rows' ends only and there is any; else None."""
        sizes = self.sizes
        if min(sizes) == self.num_nodes:
            return None
        ends = torch.tensor(sizes, device=self.valid.device).unsqueeze(1)
        at_end = torch.equal(self.valid, torch.arange(self.num_nodes, device=self.valid.device) < ends)
        return sizes if at_end else None

    @property
    def divisible(self) -> bool:
        """Whether any first columns make a tree worth checking.

        Not where virtual nodes at the end prepare the next draft, or where children were drawn: there a verdict's
        distribution rests on the shape.
        """
        return self.virtual is None and self.siblings == "deterministic"

    @property
    def mean_nodes(self) -> float:
        """Nodes of a row on average, padding not counted."""
        return sum(self.sizes) / self.batch_size

    def computed_nodes(self, uneven: bool) -> float:
        """Nodes per row that a pass computes, with ``uneven`` only those that rows have (``HFTarget.takes_uneven``)."""
        return self.mean_nodes if uneven else float(self.num_nodes)

    @cached_property
    def standing(self) -> Tensor:
        """``[B, N]`` int64: a node is one of the most promising as soon as there are more nodes per row than this.

        Its column, or where there are several rows and it is known how likely each node is, its place among the nodes
        of all rows, counted per row: what some rows do not make use of, others may. A parent never stands behind its
        child.
        """
        if self._stands_as_it_is:
            return torch.arange(self.num_nodes, device=self.parents.device).expand(self.batch_size, -1)
        assert self.confidence is not None
        return standing(self.parents, self.confidence)

    @property
    def _stands_as_it_is(self) -> bool:
        """Whether a node's standing is its column."""
        return self.batch_size == 1 or self.confidence is None

    @property
    def last_standing(self) -> int:
        """The largest ``standing`` of a node."""
        if self._stands_as_it_is and max(self.sizes) == self.num_nodes:
            return self.num_nodes - 1
        return int(self.standing.masked_fill(~self.valid, 0).max())

    def standing_on(self, path: Tensor) -> list[list[int]]:
        """``standing`` of columns ``[B, P]``."""
        on_it = path if self._stands_as_it_is else self.standing.gather(1, path)
        rows: list[list[int]] = on_it.tolist()
        return rows

    def most_promising(self, count: int) -> TokenTree:
        """The tree of ``count`` nodes per row at most, on average; the tree itself where it is not divisible."""
        if count >= self.num_nodes or not self.divisible:
            return self
        places = self.standing
        if self.confidence is not None and self.draft_log_probs is None:
            kept = keep_best(self.tokens, self.parents, self.confidence, places, count)
            if kept is not None:
                tokens, parents, confidence = kept
                return TokenTree(tokens, parents, confidence=confidence)
        return self._keep_nodes(self.valid & (places < count))

    def first(self, count: int) -> TokenTree:
        """The tree of the first ``count`` columns; the tree itself where it has no more or is not divisible."""
        if count >= self.num_nodes or not self.divisible:
            return self
        confidence = None if self.confidence is None else self.confidence[:, :count]
        return TokenTree(self.tokens[:, :count], self.parents[:, :count], confidence=confidence)

    def validate(self, vocab_size: int) -> None:
        """Raise ValueError where the tree breaks one of its invariants, naming row and column."""
        if self.tokens.dtype != torch.int64 or self.parents.dtype != torch.int64:
            raise ValueError(f"tokens and parents must be int64, got {self.tokens.dtype} and {self.parents.dtype}")
        plain = self.virtual is None and self.draft_log_probs is None
        alike = self.confidence is None or self.confidence.shape == self.tokens.shape
        if plain and alike and is_tree(self.tokens, self.parents, vocab_size):
            return
        columns = torch.arange(self.num_nodes, device=self.parents.device)
        bad = (self.parents >= columns) | (self.parents < PADDING)
        bad |= (self.parents == ROOT) != (columns == 0)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"row {row}, node {column} has parent {int(self.parents[row, column])}: the root (column 0 only) has "
                f"{ROOT}, padding {PADDING}, every other node an earlier column"
            )
        orphan = self.valid & ~self.valid.gather(1, self.parents.clamp(min=0))
        if bool(orphan.any()):
            row, column = orphan.nonzero()[0].tolist()
            raise ValueError(f"row {row}, node {column} hangs on padding node {int(self.parents[row, column])}")
        if self.virtual is not None and self.embeddings is not None:
            if self.virtual.shape != self.tokens.shape or self.embeddings.shape[:2] != self.tokens.shape:
                raise ValueError(
                    f"virtual and embeddings must begin with {tuple(self.tokens.shape)}, got "
                    f"{tuple(self.virtual.shape)} and {tuple(self.embeddings.shape)}"
                )
            if bool(self.virtual[:, 0].any()):
                raise ValueError("the root is the pending token, it cannot be virtual")
        if self.draft_log_probs is not None and self.draft_log_probs.shape != (*self.tokens.shape, vocab_size):
            raise ValueError(
                f"draft_log_probs must be {(*self.tokens.shape, vocab_size)}, got {tuple(self.draft_log_probs.shape)}"
            )
        if self.confidence is not None and self.confidence.shape != self.tokens.shape:
            raise ValueError(
                f"confidence must be {tuple(self.tokens.shape)}, as the tokens, got {tuple(self.confidence.shape)}"
            )
        real = self.valid if self.virtual is None else self.valid & ~self.virtual
        outside = real & ((self.tokens < 0) | (self.tokens >= vocab_size))
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"row {row}, node {column} holds token {int(self.tokens[row, column])}, outside the vocabulary of "
                f"{vocab_size}"
            )

    def select(self, columns: Tensor, keep: Tensor) -> TokenTree:
        """The tree reduced to some columns of each row.

        Args:
            columns: ``[B, M]`` int64, column 0 first and kept nodes' parents, which must be kept, before them.
            keep: ``[B, M]`` bool; entries that are not kept become padding.
        """
        position = torch.full_like(self.parents, PADDING)
        order = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        # amax: a column that is not kept may repeat one that is, to fill a shorter row.
        position.scatter_reduce_(1, columns, torch.where(keep, order, PADDING), "amax")
        old_parents = self.parents.gather(1, columns)
        parents = torch.where(old_parents >= 0, position.gather(1, old_parents.clamp(min=0)), old_parents)
        rows = torch.arange(self.batch_size, device=columns.device).unsqueeze(1)
        return replace(
            self,
            tokens=self.tokens.gather(1, columns),
            parents=parents.masked_fill(~keep, PADDING),
            virtual=None if self.virtual is None else self.virtual.gather(1, columns),
            embeddings=None if self.embeddings is None else self.embeddings[rows, columns],
            draft_log_probs=None if self.draft_log_probs is None else self.draft_log_probs[rows, columns],
            confidence=None if self.confidence is None else self.confidence.gather(1, columns),
        )

    def limit_depth(self, limits: Sequence[int]) -> TokenTree:
        """Drop nodes deeper than their row's limit; the tree itself where none is."""
        if min(limits) >= self.num_nodes - 1:  # a chain of all nodes is no deeper
            return self
        keep = self.valid & (self.depth <= torch.tensor(limits, device=self.parents.device).unsqueeze(1))
        return self if torch.equal(keep, self.valid) else self._keep_nodes(keep)

    def compact(self) -> TokenTree:
        """Move padding to the end and drop columns that are padding in every row."""
        return self if min(self.sizes) == self.num_nodes else self._keep_nodes(self.valid)

    def _keep_nodes(self, keep: Tensor) -> TokenTree:
        columns = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, : int(keep.sum(1).max())]
        return self.select(columns, keep.gather(1, columns))

    def seen_on_paths(self, seen: Tensor, nodes: Tensor | None = None) -> Tensor:
        """``[B, n, V]`` bool: what each node's context holds, for the repetition penalty.

        Args:
            seen: ``[B, V]`` bool, tokens of each row up to its root, included.
            nodes: ``[n]`` int64 columns; all where None.
        """
        # What padding and virtual nodes hold is ignored; the root's token is a valid index that is seen anyway.
        root = self.tokens[:, :1]
        tokens = torch.where(self.acceptable, self.tokens, root).unsqueeze(1)
        ancestors = self.ancestors if nodes is None else self.ancestors[:, nodes]
        held = torch.where(ancestors, tokens, root.unsqueeze(1))
        return seen.unsqueeze(1).repeat(1, held.shape[1], 1).scatter_(2, held, True)

    def to(self, device: torch.device | str) -> TokenTree:
        """The tree on another device; itself where it is there."""
        if self.tokens.device == torch.device(device):
            return self
        return replace(
            self,
            tokens=self.tokens.to(device),
            parents=self.parents.to(device),
            virtual=None if self.virtual is None else self.virtual.to(device),
            embeddings=None if self.embeddings is None else self.embeddings.to(device),
            draft_log_probs=None if self.draft_log_probs is None else self.draft_log_probs.to(device),
            confidence=None if self.confidence is None else self.confidence.to(device),
        )

    @classmethod
    def from_pending(cls, pending: Tensor) -> TokenTree:
        """Trees of one node, plain decoding: ``pending`` is ``[B]``."""
        return cls(pending.unsqueeze(1), torch.full_like(pending.unsqueeze(1), ROOT))

    @classmethod
    def from_rows(cls, rows: Sequence[TreeBuilder], device: torch.device | str = "cpu") -> TokenTree:
        """Batch of trees of different sizes, padded at the end."""
        width = max(len(row.tokens) for row in rows)
        tokens = [row.tokens + [0] * (width - len(row.tokens)) for row in rows]
        parents = [row.parents + [PADDING] * (width - len(row.parents)) for row in rows]
        return cls(torch.tensor(tokens, device=device), torch.tensor(parents, device=device))


def on_path(values: Tensor, path: Tensor) -> Tensor:
    """``[B, P, ...]`` of ``[B, N, ...]``: what stands in each row's columns ``[B, P]``."""
    if len(path) == 1:
        return values.index_select(1, path[0])
    return values[torch.arange(len(path), device=path.device).unsqueeze(1), path]


class TreeBuilder:
    """Builds one row's tree on the host, merging paths that share a prefix, under a budget of nodes.

    Args:
        pending: the root's token.
        max_nodes: most nodes the tree may have, root included (>= 1).
    """

    def __init__(self, pending: int, max_nodes: int) -> None:
        if max_nodes < 1:
            raise ValueError(f"max_nodes must be at least 1 (the root), got {max_nodes}")
        self.tokens = [pending]
        self.parents = [ROOT]
        self.max_nodes = max_nodes
        self._children: dict[tuple[int, int], int] = {}

    @property
    def full(self) -> bool:
        """Whether the budget is used up."""
        return len(self.tokens) >= self.max_nodes

    def add(self, parent: int, token: int) -> int | None:
        """Node of ``token`` under ``parent``, made where it is missing; None when the budget is used up."""
        node = self._children.get((parent, token))
        if node is None and not self.full:
            node = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self._children[parent, token] = node
        return node

    def add_path(self, tokens: Iterable[int]) -> None:
        """Add a path from the root, as far as the budget goes."""
        node = 0
        for token in tokens:
            child = self.add(node, token)
            if child is None:
                return
            node = child
