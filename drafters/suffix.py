"""Suffix decoding: the longest suffix seen before, in this text or an earlier one, with counts of what followed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.target import TargetOutput
from specdec.tree import TokenTree, TreeBuilder


@dataclass(frozen=True)
class SuffixConfig:
    """Options of the suffix drafter.

    Attributes:
        max_nodes: most nodes of a tree, root included.
        depth: deepest node.
        nodes_per_match: nodes proposed per matched token: a longer match is trusted further.
        min_probability: nodes with a lower estimated chance of acceptance are left out.
        corpus_tokens: earlier generations remembered, in tokens; 0 remembers none.
    """

    max_nodes: int = 16
    depth: int = 12
    nodes_per_match: float = 4.0
    min_probability: float = 0.05
    corpus_tokens: int = 200_000

    def __post_init__(self) -> None:
        for name, low in (("max_nodes", 1), ("depth", 1), ("nodes_per_match", 0.1), ("corpus_tokens", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0.0 <= self.min_probability <= 1.0:
            raise ValueError(f"min_probability must be in [0, 1], got {self.min_probability}")


_MAX_COUNTED_SUFFIXES = 64
"""States whose count an added token raises, longest suffix first. Ordinary text has fewer; a token repeated n times has
n, and without the limit counting them would take quadratic time. Shorter suffixes are then undercounted there."""


class SuffixAutomaton:
    """The smallest automaton of all substrings of some token sequences, built online, with occurrence counts.

    Blumer et al. 1985. State 0 is the empty string. A state stands for substrings that end at the same places; its
    ``link`` is the state of its longest suffix that also ends elsewhere.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link: list[int] = [-1]
        self.length: list[int] = [0]
        self.count: list[int] = [0]

    @property
    def num_states(self) -> int:
        """Number of states; at most twice the tokens added."""
        return len(self.next)

    def _new_state(self, length: int, transitions: dict[int, int], link: int, count: int) -> int:
        self.next.append(transitions)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)
        return len(self.next) - 1

    def _split(self, source: int, token: int, target: int) -> int:
        """A copy of ``target`` for the shorter strings that reach it through ``source``."""
        clone = self._new_state(self.length[source] + 1, dict(self.next[target]), self.link[target], self.count[target])
        self.link[target] = clone
        while source >= 0 and self.next[source].get(token) == target:
            self.next[source][token] = clone
            source = self.link[source]
        return clone

    def extend(self, last: int, token: int) -> int:
        """Append a token to the sequence that ends in state ``last`` (0 to begin one); the state it ends in then."""
        existing = self.next[last].get(token)
        if existing is not None:  # another sequence took this path before
            state = existing
            if self.length[existing] != self.length[last] + 1:
                state = self._split(last, token, existing)
        else:
            state = self._new_state(self.length[last] + 1, {}, 0, 0)
            source = last
            while source >= 0 and token not in self.next[source]:
                self.next[source][token] = state
                source = self.link[source]
            if source >= 0:
                target = self.next[source][token]
                if self.length[target] != self.length[source] + 1:
                    target = self._split(source, token, target)
                self.link[state] = target
        suffix = state
        for _ in range(_MAX_COUNTED_SUFFIXES):  # every suffix of the sequence occurs once more
            if suffix <= 0:
                break
            self.count[suffix] += 1
            suffix = self.link[suffix]
        return state

    def step(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """Follow a text that is not part of the automaton: state and length of its longest known suffix."""
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            matched = min(matched, self.length[state])  # the state may have been split since it was reached
        target = self.next[state].get(token)
        return (0, 0) if target is None else (target, matched + 1)


@dataclass
class _Candidate:
    """A tree grown from one match, with the sum of its nodes' estimated acceptance."""

    score: float
    nodes: list[tuple[int, int]]  # (parent, token) in order of the tree, parents first; 0 is the root
    chances: list[float]  # of each node to be accepted, the root's first


@dataclass
class _RowState:
    """What is kept per row: its own automaton, and where its text stands in it and in the corpus."""

    automaton: SuffixAutomaton
    last: int = 0
    corpus_state: int = 0
    corpus_matched: int = 0
    consumed: int = 0


class SuffixDrafter(Drafter):
    """SuffixDecoding (Oliaro et al. 2024) on suffix automata: one per row and one over finished generations."""

    name = "suffix"
    Config = SuffixConfig

    def __init__(self, config: SuffixConfig | None = None) -> None:
        self.config = config or SuffixConfig()
        self._rows: dict[int, _RowState] = {}
        self._corpus = SuffixAutomaton()

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._rows = {row.row_id: _RowState(SuffixAutomaton()) for row in batch.rows}

    def propose(self, batch: Batch) -> TokenTree:
        builders, chances = [], []
        for row in batch.rows:
            state = self._rows[row.row_id]
            self._consume(state, row.tokens)
            depth = min(self.config.depth, row.max_depth)
            candidates = [self._grow(state.automaton, *match, depth) for match in self._own_matches(state)]
            if state.corpus_matched:
                candidates.append(self._grow(self._corpus, state.corpus_state, state.corpus_matched, depth))
            builder, known = TreeBuilder(row.pending, self.config.max_nodes), {0: 1.0}
            for candidate in sorted(candidates, key=lambda c: -c.score):
                _merge(builder, candidate, known)
            builders.append(builder)
            chances.append([known[node] for node in range(len(builder.tokens))])
        tree = TokenTree.from_rows(builders, batch.device)
        confidence = torch.zeros(tree.tokens.shape)
        for index, values in enumerate(chances):
            confidence[index, : len(values)] = torch.tensor(values)
        return replace(tree, confidence=confidence.to(batch.device))

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        for index in set(range(len(batch))) - set(rows):
            row = batch.rows[index]
            del self._rows[row.row_id]
            self._remember(row.tokens)

    def stop(self) -> None:
        self._rows = {}

    def _remember(self, tokens: Sequence[int]) -> None:
        """Add a finished text to the corpus, which starts anew when it is full."""
        if len(tokens) > self.config.corpus_tokens:
            return
        if self._corpus.num_states > 2 * self.config.corpus_tokens:
            self._corpus = SuffixAutomaton()
            for state in self._rows.values():
                state.corpus_state = state.corpus_matched = 0
        last = 0
        for token in tokens:
            last = self._corpus.extend(last, token)

    def _consume(self, state: _RowState, tokens: Sequence[int]) -> None:
        for token in tokens[state.consumed :]:
            state.last = state.automaton.extend(state.last, token)
            state.corpus_state, state.corpus_matched = self._corpus.step(
                state.corpus_state, state.corpus_matched, token
            )
        state.consumed = len(tokens)

    @staticmethod
    def _own_matches(state: _RowState) -> list[tuple[int, int]]:
        """The two longest suffixes of the row that occur earlier in it, as (state, length)."""
        matches: list[tuple[int, int]] = []
        suffix = state.automaton.link[state.last]
        while suffix > 0 and len(matches) < 2:
            matches.append((suffix, state.automaton.length[suffix]))
            suffix = state.automaton.link[suffix]
        return matches

    def _grow(self, automaton: SuffixAutomaton, state: int, matched: int, depth: int) -> _Candidate:
        """Best-first expansion by estimated probability, the share of a state's occurrences that went on this way.

        The chance of acceptance discounts that share by how little a short match says: ``m / (m + 1)`` for a match of m
        tokens, every node being one more.
        """
        budget = min(self.config.max_nodes - 1, max(1, int(self.config.nodes_per_match * matched)))
        nodes: list[tuple[int, int]] = []
        chances = [1.0]
        score = 0.0
        tie = 0
        heap: list[tuple[float, int, int, int, int, int]] = []  # (-probability, tie, parent, token, state, depth)

        def push_children(parent: int, of: int, probability: float, level: int) -> None:
            nonlocal tie
            followed = sum(automaton.count[child] for child in automaton.next[of].values())
            for token, child in automaton.next[of].items():
                chance = probability * automaton.count[child] / followed
                if chance >= self.config.min_probability:
                    tie += 1
                    heapq.heappush(heap, (-chance, tie, parent, token, child, level))

        if depth > 0:
            push_children(0, state, 1.0, 1)
        while heap and len(nodes) < budget:
            negative, _, parent, token, child, level = heapq.heappop(heap)
            nodes.append((parent, token))
            chances.append(-negative * matched / (matched + level))
            score -= negative
            if level < depth:
                push_children(len(nodes), child, -negative, level + 1)
        return _Candidate(score * matched / (matched + 1.0), nodes, chances)


def _merge(builder: TreeBuilder, candidate: _Candidate, chances: dict[int, float]) -> None:
    """Add a candidate's nodes to a tree that may hold some of them already; of two chances the better one counts."""
    place: list[int | None] = [0]
    for (parent, token), chance in zip(candidate.nodes, candidate.chances[1:], strict=True):
        at = place[parent]
        node = None if at is None else builder.add(at, token)
        place.append(node)
        if node is not None:
            chances[node] = max(chances.get(node, 0.0), chance)
