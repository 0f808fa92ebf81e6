"""The tree of a given size that promises the most tokens: Sequoia's dynamic programme (Chen et al. 2024, section 3.1).

It needs one assumption, positional acceptance: the chance that a node's child of rank r is the accepted one depends on
r alone, or on r and the node's depth, as calibrated drafters report it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.tree import ROOT

ROUNDED = 1e-3
"""What rounding may add to a sum of chances that were written with four digits."""


@dataclass(frozen=True)
class RankedTree:
    """A tree's shape; parents stand before their children.

    Attributes:
        parents: node above each, ``ROOT`` for node 0.
        ranks: which child of its parent each is, 0 the best; -1 for the root.
        tokens: expected tokens per pass, the bonus token included.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    tokens: float

    @property
    def depth(self) -> int:
        """Edges from the root to the deepest node."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return max(depths)

    @property
    def width(self) -> int:
        """Most nodes of one depth that have children: how many a drafter must expand there; 0 for a root alone."""
        depths, inner = [0], set(self.parents[1:])
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return max(Counter(depths[node] for node in inner).values(), default=0)


class OptimalTrees:
    """The best trees of all sizes and depths for given chances.

    With ``T[m][l][b]`` the most tokens of m nodes at most l deep whose root has exactly the children of the first b
    ranks, and ``best(m, l) = max_b T[m][l][b]``::

        T[1][l][0] = 1
        T[m][l][b] = max_y T[y][l][b-1] + p_b * best(m - y, l - 1)

    Where chances depend on depth as well, tables are made for each depth the subtree's root may have.

    Args:
        chances: ``p_1, p_2, ...``, that the child of each rank is accepted, given that its parent is; they exclude each
            other, so they sum to at most 1. Or a row of them per depth of the child, from 1 on; deeper there is none.
        max_nodes: largest size, root included.
        max_depth: deepest node.

    Raises:
        ValueError: for chances outside [0, 1], a sum beyond 1, or limits below 1 node or depth 0.
    """

    def __init__(self, chances: Sequence[float] | Sequence[Sequence[float]], max_nodes: int, max_depth: int) -> None:
        self._by_depth = len(chances) > 0 and isinstance(chances[0], Sequence)
        rows: Any = chances if self._by_depth else [chances]
        self._rows: list[list[float]] = [[float(chance) for chance in row] for row in rows]
        for row in self._rows:
            if not all(0.0 <= chance <= 1.0 for chance in row) or sum(row) > 1.0 + ROUNDED:
                raise ValueError(f"chances must lie in [0, 1] and sum to at most 1, got {row}")
        if max_nodes < 1 or max_depth < 0:
            raise ValueError(f"a tree has at least 1 node and depth 0, got {max_nodes} and {max_depth}")
        self.max_nodes, self.max_depth = max_nodes, max_depth
        self._tables: dict[tuple[int, int], _Table] = {}

    def _table(self, at: int, left: int) -> _Table:
        """Subtrees whose root is ``at`` deep and which may go ``left`` deeper."""
        at = at if self._by_depth else 0
        if (at, left) not in self._tables:
            last = left == 0 or at >= len(self._rows)
            below = None if last else self._table(at + 1, left - 1)
            self._tables[at, left] = _Table(self._rows[at] if below else [], self.max_nodes, below)
        return self._tables[at, left]

    def tokens(self, nodes: int, depth: int) -> float | None:
        """Expected tokens per pass of the best tree of exactly that many nodes; None where none is that flat."""
        value = self._table(0, depth).best[nodes]
        return None if value < 0 else value

    def tree(self, nodes: int, depth: int) -> RankedTree:
        """The best tree of exactly ``nodes`` nodes, at most ``depth`` deep. Raises ValueError where there is none."""
        value = self.tokens(nodes, depth)
        if value is None:
            raise ValueError(
                f"{max(map(len, self._rows))} ranks make no tree of {nodes} nodes that is at most {depth} deep"
            )
        parents, ranks = [ROOT], [-1]

        def grow(node: int, size: int, at: int) -> None:
            children, table = [], self._table(at, depth - at)
            for rank in range(table.arity[size], 0, -1):
                rest = table.split[size, rank]
                children.append((rank - 1, size - rest))
                size = rest
            for rank, share in reversed(children):
                parents.append(node)
                ranks.append(rank)
                grow(len(parents) - 1, share, at + 1)

        grow(0, nodes, 0)
        return RankedTree(tuple(parents), tuple(ranks), value)

    def best(self, nodes: int, depth: int) -> RankedTree:
        """The tree of at most ``nodes`` nodes and so deep that promises most; the smaller one of equals."""
        sizes = {size: self.tokens(size, depth) or 0.0 for size in range(1, nodes + 1)}
        return self.tree(max(sizes, key=lambda size: (sizes[size], -size)), depth)

    def fastest(self, pass_ms: Callable[[int], float], draft_ms: Callable[[int, float], float]) -> RankedTree:
        """The tree that takes the least time per token, ``(draft_ms(depth, tokens) + pass_ms(nodes)) / tokens``.

        Args:
            pass_ms: the target's time for a pass over n nodes.
            draft_ms: the drafter's time for a tree so deep, by which a step is expected to emit so many tokens.
        """
        found = (1.0 / pass_ms(1), 1, 0)
        for depth in range(1, self.max_depth + 1):
            for nodes in range(depth + 1, self.max_nodes + 1):
                tokens = self.tokens(nodes, depth)
                if tokens is not None:
                    rate = tokens / (draft_ms(depth, tokens) + pass_ms(nodes))
                    if rate > found[0]:
                        found = rate, nodes, depth
        return self.tree(found[1], found[2])


class _Table:
    """The best subtrees by number of nodes.

    Args:
        chances: of the root's children by rank; none where it must be a leaf.
        max_nodes: largest size.
        below: the same of its children.
    """

    def __init__(self, chances: Sequence[float], max_nodes: int, below: _Table | None) -> None:
        self.best = [-1.0] * (max_nodes + 1)  # tokens; -1 where there is no such tree
        self.arity = [0] * (max_nodes + 1)
        self.split: dict[tuple[int, int], int] = {}  # (m, b) -> y, nodes left to the better ranks
        table = [-1.0] * (max_nodes + 1)  # of b children
        table[1] = self.best[1] = 1.0
        for children, chance in enumerate(chances, start=1):
            assert below is not None
            more = [-1.0] * (max_nodes + 1)
            for size in range(children + 1, max_nodes + 1):
                for rest in range(children, size):
                    if table[rest] < 0 or below.best[size - rest] < 0:
                        continue
                    value = table[rest] + chance * below.best[size - rest]
                    if value > more[size]:
                        more[size], self.split[size, children] = value, rest
                if more[size] > self.best[size]:
                    self.best[size], self.arity[size] = more[size], children
            table = more
