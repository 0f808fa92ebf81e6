"""Trees of several drafters as one: equal tokens under equal parents are one node, the most promising come first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from specdec.drafters.hybrid_calibration import MOST, Calibration, Odds, agreed
from specdec.tree import TokenTree


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
        calibration: what chances are corrected by.
        row: how each part does in this text.
    """

    def __init__(self, pending: int, calibration: Calibration, row: Sequence[Odds]) -> None:
        self.nodes = [_Node(pending, -1, 0)]
        self._calibration = calibration
        self._row = row

    def add(self, part: int, tree: TokenTree, index: int, max_depth: int) -> None:
        """Merge row ``index`` of a part's tree, as far as ``max_depth``, and score all nodes anew."""
        tokens, parents = tree.tokens[index].tolist(), tree.parents[index].tolist()
        confidence = None if tree.confidence is None else tree.confidence[index].tolist()
        place = {0: 0}  # column of the part's tree -> node
        for column in range(1, len(tokens)):
            parent = place.get(parents[column])
            if parent is None or self.nodes[parent].depth >= max_depth:
                continue
            place[column] = self._child(parent, tokens[column])
            above = self.nodes[parent]
            rank = sum(part in self.nodes[child].proposals for child in above.children.values())
            given = None if confidence is None else confidence[column] / max(confidence[parents[column]], 1e-9)
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
            share = min(1.0, MOST / sum(node.claim for node in children)) if children else 1.0
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
        return sum(self.nodes[node].joint for node in chosen) - 1.0

    def accepted(self, chosen: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of the tokens that followed the root a tree of some nodes would have had accepted.

        One less than the tokens where it holds them all, as far as is known: the last one may be the bonus token.
        """
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
        """Tokens, parents (as columns; -1 for the root) and chances of a tree of some nodes."""
        column = {node: place for place, node in enumerate(chosen)}
        tokens = [self.nodes[node].token for node in chosen]
        parents = [-1 if node == 0 else column[self.nodes[node].parent] for node in chosen]
        return tokens, parents, [self.nodes[node].joint for node in chosen]


def _bits(parts: Iterable[int]) -> int:
    found = 0
    for part in parts:
        found |= 1 << part
    return found
