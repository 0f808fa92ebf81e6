"""Trees of several drafters as one: equal tokens under equal parents are one node, the most promising come first.

The reference of ``specdec.kernels.merge``, and what serves where that does not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.drafters.hybrid_calibration import MOST, Calibration, Odds, agreed
from specdec.tree import PADDING, ROOT


@dataclass(slots=True)
class _Proposal:
    """What one part said of a node: its confidence given the parent, and the rank among the siblings it proposed."""

    confidence: float | None
    rank: int


@dataclass(slots=True)
class _Node:
    """A node of the merged tree; ``claim`` is its chance before, ``chance`` after agreement was accounted for."""

    token: int
    parent: int
    depth: int
    proposals: dict[int, _Proposal] = field(default_factory=dict)
    children: dict[int, int] = field(default_factory=dict)
    claim: float = 1.0
    chance: float = 1.0
    joint: float = 1.0


class MergedTree:
    """One row's proposals.

    Args:
        pending: the root's token.
        max_depth: below it nodes are left out.
        calibration: what chances are corrected by.
        row: how each part does in this text.
    """

    def __init__(self, pending: int, max_depth: int, calibration: Calibration, row: Sequence[Odds]) -> None:
        self.nodes = [_Node(pending, -1, 0)]
        self._max_depth = max_depth
        self._calibration = calibration
        self._row = row

    def add(self, part: int, tokens: list[int], parents: list[int], confidence: list[float] | None) -> None:
        """Merge a part's tree and score all nodes anew."""
        place = {0: 0}  # column of the part's tree -> node
        for column in range(1, len(tokens)):
            parent = place.get(parents[column])
            if parent is None or self.nodes[parent].depth >= self._max_depth:
                continue
            place[column] = self._child(parent, tokens[column])
            above = self.nodes[parent]
            rank = sum(part in self.nodes[child].proposals for child in above.children.values())
            given = None if confidence is None else _given(confidence[column], confidence[parents[column]])
            self.nodes[place[column]].proposals.setdefault(part, _Proposal(given, rank))
        self._score()

    def _child(self, parent: int, token: int) -> int:
        above = self.nodes[parent]
        node = above.children.get(token)
        if node is None:
            node = above.children[token] = len(self.nodes)
            self.nodes.append(_Node(token, parent, above.depth + 1))
        return node

    def _score(self) -> None:
        """Parents come before their children."""
        for above in self.nodes:
            children = [self.nodes[child] for child in above.children.values()]
            for node in children:
                node.claim = agreed([self._chance(part, node) for part in node.proposals])
            # Only one of them can be right.
            share = min(1.0, MOST / _total(node.claim for node in children)) if children else 1.0
            spoke = _bits(part for node in children for part in node.proposals)
            for node in children:
                node.claim *= share
                proposers = _bits(node.proposals)
                node.chance = self._calibration.agreement.chance(node.claim, proposers, spoke & ~proposers)
                node.joint = above.joint * node.chance

    def _chance(self, part: int, node: _Node) -> float:
        said = node.proposals[part]
        chance = self._calibration.parts[part].chance(said.confidence, node.depth, said.rank)
        return self._row[part].correct(chance)

    def best(self, max_nodes: int, least: float = 0.0) -> list[int]:
        """The nodes most likely to be accepted, the best first and the root before all; closed under ancestors.

        Args:
            max_nodes: at most, root included.
            least: chance below which nodes are left out.
        """
        order = sorted(range(len(self.nodes)), key=lambda node: -self.nodes[node].joint)
        return [node for node in order[:max_nodes] if node == 0 or self.nodes[node].joint >= least]

    def expected(self, chosen: Sequence[int]) -> float:
        """Accepted nodes to be expected of a tree of some nodes."""
        return _total(self.nodes[node].joint for node in chosen) - 1.0

    def accepted(self, chosen: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of the tokens that followed the root a tree of some nodes would have had accepted."""
        among, node, count = set(chosen), 0, 0
        for token in tokens:
            child = self.nodes[node].children.get(token)
            if child is None or child not in among:
                break
            node, count = child, count + 1
        return count

    def learn(self, tokens: Sequence[int]) -> None:
        """The target went this way from the root: all children of the nodes on it were right or wrong.

        Args:
            tokens: accepted tokens and the one that followed them.
        """
        node = 0
        for token in tokens:
            children = [self.nodes[child] for child in self.nodes[node].children.values()]
            spoke = _bits(part for child in children for part in child.proposals)
            for child in children:
                hit = child.token == token
                proposers = _bits(child.proposals)
                self._calibration.agreement.see(child.claim, proposers, spoke & ~proposers, hit)
                for part, said in child.proposals.items():
                    calibration = self._calibration.parts[part]
                    chance = calibration.chance(said.confidence, child.depth, said.rank)
                    self._row[part].see(chance, hit)
                    calibration.see(said.confidence, child.depth, said.rank, hit)
            following = self.nodes[node].children.get(token)
            if following is None:
                return
            node = following

    def columns(self, chosen: Sequence[int]) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents (as columns) and chances of a tree of some nodes."""
        column = {node: place for place, node in enumerate(chosen)}
        tokens = [self.nodes[node].token for node in chosen]
        parents = [ROOT if node == 0 else column[self.nodes[node].parent] for node in chosen]
        return tokens, parents, [self.nodes[node].joint for node in chosen]


class PythonTrees:
    """One tree per row, of a root before anything is added: a ``MergedTrees`` of ``specdec.drafters.hybrid_merger``.

    Args:
        pending: the roots' tokens.
        max_depth: of each row, depth below which nodes are left out.
        calibration: what chances are corrected by; learns.
        rows: how parts do in each row's text; learn.
    """

    def __init__(
        self, pending: Sequence[int], max_depth: Sequence[int], calibration: Calibration, rows: Sequence[Sequence[Odds]]
    ) -> None:
        self.sizes, self.expected = [[1] * len(pending)], [[0.0] * len(pending)]
        self._trees = [
            MergedTree(token, deepest, calibration, row)
            for token, deepest, row in zip(pending, max_depth, rows, strict=True)
        ]
        self._chosen = [[[0] for _ in pending]]  # per choice, per row

    def add(self, part: int, tokens: Tensor, parents: Tensor, confidence: Tensor | None) -> None:
        if tokens[:, 0].tolist() != [tree.nodes[0].token for tree in self._trees]:
            raise ValueError("there must be one tree per row, rooted at its pending token")
        chances = [None] * len(tokens) if confidence is None else confidence.float().tolist()
        for tree, *proposed in zip(self._trees, tokens.tolist(), parents.tolist(), chances, strict=True):
            tree.add(part, *proposed)

    def choose(
        self, max_nodes: int, least: float, most: int, worth: Callable[[Sequence[float]], int] | None = None
    ) -> None:
        best = [tree.best(max_nodes, least) for tree in self._trees]
        joint = sorted(
            (
                (tree.nodes[node].joint, -place, -row)
                for row, (tree, nodes) in enumerate(zip(self._trees, best, strict=True))
                for place, node in enumerate(nodes[1:])
            ),
            reverse=True,
        )
        count = most if worth is None else worth([chance for chance, *_ in joint[:most]])
        taken = Counter(-row for *_, row in joint[:count])
        chosen = [nodes[: 1 + taken[row]] for row, nodes in enumerate(best)]
        self._chosen.append(chosen)
        self.sizes.append([len(nodes) for nodes in chosen])
        self.expected.append([tree.expected(nodes) for tree, nodes in zip(self._trees, chosen, strict=True)])

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        width = max(self.sizes[-1])
        rows = [tree.columns(nodes) for tree, nodes in zip(self._trees, self._chosen[-1], strict=True)]
        tokens = [row + [0] * (width - len(row)) for row, _, _ in rows]
        parents = [row + [PADDING] * (width - len(row)) for _, row, _ in rows]
        chances = [row + [0.0] * (width - len(row)) for _, _, row in rows]
        return torch.tensor(tokens), torch.tensor(parents), torch.tensor(chances, dtype=torch.float32)

    def learn(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        accepted = [
            [tree.accepted(*each) for tree, *each in zip(self._trees, chosen, tokens, strict=True)]
            for chosen in self._chosen
        ]
        for tree, emitted in zip(self._trees, tokens, strict=True):
            tree.learn(emitted)
        return accepted

    def keep(self, rows: Sequence[int]) -> None:
        self._trees = [self._trees[row] for row in rows]
        self._chosen = [[chosen[row] for row in rows] for chosen in self._chosen]
        self.sizes = [[sizes[row] for row in rows] for sizes in self.sizes]
        self.expected = [[expected[row] for row in rows] for expected in self.expected]


def _given(confidence: float, above: float) -> float | None:
    """A part's confidence in a node given its parent; one that is no number counts as none."""
    given = confidence / max(above, 1e-9)
    return None if math.isnan(given) else given


def _total(values: Iterable[float]) -> float:
    """Plain additions: from Python 3.12 on ``sum`` makes up for their rounding, which compiled ones do not."""
    total = 0.0
    for value in values:
        total += value
    return total


def _bits(parts: Iterable[int]) -> int:
    found = 0
    for part in parts:
        found |= 1 << part
    return found
