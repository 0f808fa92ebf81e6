"""The arithmetic of PPD's sparse trees (Chen et al. 2024, section 4; METHODS.md section 3), in plain numbers.

A *table* ``acc[d][r]`` holds the chance that the guess of rank r at distance d + 1 is right, given that the path to it
is. A step's *state* is how many prompt tokens hung below the node accepted last: as many distances can be drafted. The
tree of a state has candidates (guesses) and, below the root and every candidate, some prompt tokens, which decide the
next state if that node turns out to be the last one accepted.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

Table = Sequence[Sequence[float]]
"""``[D][R]`` chances in [0, 1]; the ranks of one distance exclude each other, so they sum to at most 1."""

_SQUARINGS = 24
"""Doublings of the number of steps a chain is followed: 2^24 steps."""


@dataclass(frozen=True)
class Candidates:
    """A tree of guesses; node 0 is the root, parents stand before their children.

    Attributes:
        parents: node above each; -1 for the root.
        distances: edges from the root.
        ranks: which guess of its distance each is; -1 for the root.
        chances: that the whole path to each is right; 1 for the root.
    """

    parents: tuple[int, ...]
    distances: tuple[int, ...]
    ranks: tuple[int, ...]
    chances: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parents)

    def first(self, count: int) -> Candidates:
        """The root and the ``count`` nodes after it, the best tree of that size where this one is the best of its."""
        end = count + 1
        return Candidates(self.parents[:end], self.distances[:end], self.ranks[:end], self.chances[:end])

    @property
    def expected(self) -> float:
        """f, the expected number of accepted guesses: the sum of the chances of all but the root."""
        return sum(self.chances[1:])

    @property
    def last(self) -> list[float]:
        """p_c of each node, the chance that it is the last one accepted: its own less those of its children."""
        left = list(self.chances)
        for node in range(1, len(left)):
            left[self.parents[node]] -= self.chances[node]
        return [max(chance, 0.0) for chance in left]


def best_candidates(table: Table, count: int) -> Candidates:
    """The ``count`` guesses of highest chance, or all that have any, as a tree in the order of their chance.

    As chances only fall along a path and from one guess to the next better ranked sibling, the best unseen guess is
    always the first child or the next sibling of one chosen before.
    """
    order = [sorted(range(len(row)), key=lambda r, row=row: (-row[r], r)) for row in table]  # type: ignore[misc]
    parents, distances, ranks, chances = [-1], [0], [-1], [1.0]
    heap: list[tuple[float, int, int, int]] = []  # -chance, tie-break, parent, place in the order of its distance

    def offer(parent: int, place: int) -> None:
        distance = distances[parent]
        if distance < len(order) and place < len(order[distance]):
            chance = chances[parent] * table[distance][order[distance][place]]
            if chance > 0.0:
                heapq.heappush(heap, (-chance, parent, place, distance))

    offer(0, 0)
    while heap and len(parents) <= count:
        negative, parent, place, distance = heapq.heappop(heap)
        parents.append(parent)
        distances.append(distance + 1)
        ranks.append(order[distance][place])
        chances.append(-negative)
        offer(len(parents) - 1, 0)
        offer(parent, place + 1)
    return Candidates(tuple(parents), tuple(distances), tuple(ranks), tuple(chances))


def attach(last: Sequence[float], gains: Sequence[float], limit: int, keep: int = 1) -> list[int]:
    """How many prompt tokens hang below each node.

    All of them below every node at first; while there are more than ``limit``, the one whose loss costs least goes:
    ``p_c * (f_j - f_{j-1})`` for the j-th below node c.

    Args:
        last: p_c of each node.
        gains: ``f_j - f_{j-1}`` for j = 1..k.
        limit: most prompt tokens in all.
        keep: fewest below a node.

    Raises:
        ValueError: where ``keep`` below each node are more than ``limit``.
    """
    if keep * len(last) > limit:
        raise ValueError(f"{limit} prompt tokens are too few for {len(last)} nodes with at least {keep} each")
    counts = [len(gains)] * len(last)
    excess = len(gains) * len(last) - limit
    # Of equal losses the later node's goes first.
    heap = [(chance * gains[-1], -node) for node, chance in enumerate(last)] if len(gains) > keep else []
    heapq.heapify(heap)
    for _ in range(excess):
        node = -heapq.heappop(heap)[1]
        counts[node] -= 1
        if counts[node] > keep:
            heapq.heappush(heap, (last[node] * gains[counts[node] - 1], -node))
    return counts


def transitions(last: Sequence[float], attached: Sequence[int], num_states: int) -> list[float]:
    """``[num_states]`` chance of each next state from the tree of one state."""
    row = [0.0] * num_states
    for chance, count in zip(last, attached, strict=True):
        row[count] += chance
    return row


def stationary(chain: Sequence[Sequence[float]], start: int) -> NDArray[np.float64]:
    """``[S]`` the share of steps a chain spends in each state in the long run, begun in ``start``.

    Args:
        chain: ``[S][S]`` row s holds the chances of the states after s; rows sum to 1.
        start: matters only where the chain falls into parts it does not leave.
    """
    steps = np.asarray(chain, dtype=np.float64)
    steps = (steps + np.eye(len(steps))) / 2  # the same shares, and no cycles
    for _ in range(_SQUARINGS):
        steps = steps @ steps
        steps /= steps.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = steps[start]
    return shares


@dataclass(frozen=True)
class Plan:
    """The trees of all states for one budget.

    Attributes:
        budget: most nodes of a pass: root, guesses and prompt tokens.
        trees: ``[k + 1]`` guesses of each state; state 0 has the root alone.
        attached: ``[k + 1]`` prompt tokens below each of their nodes.
        shares: ``[k + 1]`` of the steps, pi.
        expected: f of each state.
    """

    budget: int
    trees: tuple[Candidates, ...]
    attached: tuple[tuple[int, ...], ...]
    shares: tuple[float, ...]
    expected: tuple[float, ...]

    @property
    def tau(self) -> float:
        """Expected tokens per pass, the bonus token included: ``1 + sum of pi_k f_k``."""
        return 1.0 + sum(share * f for share, f in zip(self.shares, self.expected, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Guesses of each state."""
        return tuple(len(tree) - 1 for tree in self.trees)

    @property
    def gains(self) -> tuple[float, ...]:
        """``f_j - f_{j-1}`` for j = 1..k, what a j-th prompt token is worth."""
        return tuple(right - left for left, right in pairwise(self.expected))


def make_plan(table: Table, budget: int, ensembles: int = 1, keep: int = 1) -> Plan:
    """The sizes of the trees that promise the most tokens per pass.

    One size for all states is tried first, every one that fits; then each state's own, in turn, as long as that helps.

    Args:
        table: ``[k][R]`` calibrated chances; k prompt tokens.
        budget: most nodes of a pass.
        ensembles: nodes per prompt token, m.
        keep: fewest prompt tokens below a node, 0 or 1.

    Raises:
        ValueError: where the budget leaves no room for a guess.
    """
    num_tokens = len(table)
    largest = largest_tree(budget, ensembles, keep)
    if num_tokens < 1 or largest < 1:
        raise ValueError(
            f"a pass of {budget} nodes has no room for a guess with {ensembles} nodes per prompt token: it takes at "
            f"least {2 + (1 + keep) * ensembles}"
        )
    trees = [best_candidates(table[:state], largest if state else 0) for state in range(num_tokens + 1)]

    def planned(sizes: Sequence[int]) -> Plan:
        return _with_sizes(trees, sizes, budget, ensembles, keep)

    best = max((planned([0] + [size] * num_tokens) for size in range(1, largest + 1)), key=lambda plan: plan.tau)
    improved = True
    while improved:
        improved = False
        for state in range(1, num_tokens + 1):
            for size in range(1, largest + 1):
                sizes = list(best.sizes)
                sizes[state] = size
                plan = planned(sizes)
                if plan.tau > best.tau + 1e-9:
                    best, improved = plan, True
    return best


def largest_tree(budget: int, ensembles: int, keep: int) -> int:
    """Most guesses a pass has room for, with prompt tokens below the root at least."""
    if keep:
        return (budget - 1 - keep * ensembles) // (1 + keep * ensembles)
    return budget - 1 - ensembles


def _with_sizes(trees: Sequence[Candidates], sizes: Sequence[int], budget: int, ensembles: int, keep: int) -> Plan:
    """The plan of given sizes."""
    states = len(trees)
    cut = [tree.first(size) for tree, size in zip(trees, sizes, strict=True)]
    expected = [tree.expected for tree in cut]
    gains = [right - left for left, right in pairwise(expected)]
    attached, chain = [], []
    for tree in cut:
        last = tree.last
        attached.append(tuple(attach(last, gains, (budget - len(tree)) // ensembles, keep)))
        chain.append(transitions(last, attached[-1], states))
    shares = stationary(chain, start=states - 1)
    return Plan(budget, tuple(cut), tuple(attached), tuple(shares.tolist()), tuple(expected))


def choose_budget(latency: Mapping[int, float], plan: Callable[[int], Plan]) -> Plan:
    """The plan of the budget n that maximises ``tau(n) / L(n)``.

    Args:
        latency: L, the measured time of an n-node pass on this machine in this precision, in any unit.
        plan: the plan of a budget.

    Raises:
        ValueError: where a latency is not a positive number.
    """
    for nodes, time in latency.items():
        if not (math.isfinite(time) and time > 0):
            raise ValueError(f"the latency of a pass of {nodes} nodes is {time}: it must be a positive number")
    return max((plan(nodes) for nodes in sorted(latency)), key=lambda made: made.tau / latency[made.budget])


def hit_table(rates: Table, num_tokens: int) -> list[list[float]]:
    """Calibrated rates of the first prompt tokens, made fit for a plan: clipped to [0, 1], each row to sum 1."""
    table = []
    for row in rates[:num_tokens]:
        clipped = [min(max(float(rate), 0.0), 1.0) for rate in row]
        total = max(list(accumulate(clipped))[-1], 1.0) if clipped else 1.0
        table.append([rate / total for rate in clipped])
    return table
