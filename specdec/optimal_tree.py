"""The tree of a given size that promises the most tokens: Sequoia's dynamic programme (Chen et al. 2024, section 3.1).

It needs one assumption, positional acceptance: the chance that a node's child of rank r is the accepted one depends on
r alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.tree import ROOT


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


class OptimalTrees:
    """The best trees of all sizes and depths for given chances.

    With ``T[m][l][b]`` the most tokens of m nodes at most l deep whose root has exactly the children of the first b
    ranks, and ``best(m, l) = max_b T[m][l][b]``::

        T[1][l][0] = 1
        T[m][l][b] = max_y T[y][l][b-1] + p_b * best(m - y, l - 1)

    Args:
        chances: ``p_1, p_2, ...``, that the child of each rank is accepted, given that its parent is; they exclude each
            other, so they sum to at most 1.
        max_nodes: largest size, root included.
        max_depth: deepest node.

    Raises:
        ValueError: for chances outside [0, 1], a sum beyond 1, or limits below 1 node or depth 0.
    """

    def __init__(self, chances: Sequence[float], max_nodes: int, max_depth: int) -> None:
        if not all(0.0 <= chance <= 1.0 for chance in chances) or sum(chances) > 1.0 + 1e-9:
            raise ValueError(f"chances must lie in [0, 1] and sum to at most 1, got {list(chances)}")
        if max_nodes < 1 or max_depth < 0:
            raise ValueError(f"a tree has at least 1 node and depth 0, got {max_nodes} and {max_depth}")
        self._chances = list(chances)
        self.max_nodes, self.max_depth = max_nodes, max_depth
        self._best = [[-1.0] * (max_nodes + 1) for _ in range(max_depth + 1)]  # [l][m]
        self._arity = [[0] * (max_nodes + 1) for _ in range(max_depth + 1)]
        self._split: dict[tuple[int, int, int], int] = {}  # (l, m, b) -> y, nodes left to the better ranks
        for depth in range(max_depth + 1):
            self._fill(depth)

    def _fill(self, depth: int) -> None:
        table = [-1.0] * (self.max_nodes + 1)  # of b children, by m; -1 where there is no such tree
        table[1] = 1.0
        best, arity = self._best[depth], self._arity[depth]
        best[1] = 1.0
        if depth == 0:
            return
        below = self._best[depth - 1]
        for children, chance in enumerate(self._chances, start=1):
            more = [-1.0] * (self.max_nodes + 1)
            for size in range(children + 1, self.max_nodes + 1):
                for rest in range(children, size):
                    if table[rest] < 0 or below[size - rest] < 0:
                        continue
                    value = table[rest] + chance * below[size - rest]
                    if value > more[size]:
                        more[size], self._split[depth, size, children] = value, rest
                if more[size] > best[size]:
                    best[size], arity[size] = more[size], children
            table = more

    def tokens(self, nodes: int, depth: int) -> float | None:
        """Expected tokens per pass of the best tree of exactly that many nodes; None where none is that flat."""
        value = self._best[depth][nodes]
        return None if value < 0 else value

    def tree(self, nodes: int, depth: int) -> RankedTree:
        """The best tree of exactly ``nodes`` nodes, at most ``depth`` deep. Raises ValueError where there is none."""
        value = self.tokens(nodes, depth)
        if value is None:
            raise ValueError(f"{len(self._chances)} ranks make no tree of {nodes} nodes that is at most {depth} deep")
        parents, ranks = [ROOT], [-1]

        def grow(node: int, size: int, level: int) -> None:
            children = []
            for rank in range(self._arity[level][size], 0, -1):
                rest = self._split[level, size, rank]
                children.append((rank - 1, size - rest))
                size = rest
            for rank, share in reversed(children):
                parents.append(node)
                ranks.append(rank)
                grow(len(parents) - 1, share, level - 1)

        grow(0, nodes, depth)
        return RankedTree(tuple(parents), tuple(ranks), value)

    def fastest(self, pass_ms: Callable[[int], float], level_ms: float) -> RankedTree:
        """The tree that takes the least time per token, ``(depth * level_ms + pass_ms(nodes)) / tokens``.

        Args:
            pass_ms: the target's time for a pass over n nodes.
            level_ms: the drafter's time per level of depth.
        """
        found = (1.0 / pass_ms(1), 1, 0)
        for depth in range(1, self.max_depth + 1):
            for nodes in range(depth + 1, self.max_nodes + 1):
                tokens = self.tokens(nodes, depth)
                if tokens is not None:
                    rate = tokens / (depth * level_ms + pass_ms(nodes))
                    if rate > found[0]:
                        found = rate, nodes, depth
        return self.tree(found[1], found[2])
