"""The corpus in Python: what the compiled one is compared with, and what serves where there is no compiler."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from specdec.kernels.suffix.corpus import Asked
from specdec.tree import TokenTree, TreeBuilder

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
class _Text:
    """A text in flight: its own automaton, where it ends in it, and where it stands in that of finished texts."""

    own: SuffixAutomaton
    finished: SuffixAutomaton
    end: int = 0
    in_finished: int = 0
    matched: int = 0
    last_token: int = 0


class ReferenceCorpus:
    """See ``SuffixCorpus`` and ``make_corpus``."""

    def __init__(self, max_nodes: int, nodes_per_match: float, min_probability: float, corpus_tokens: int) -> None:
        self._max_nodes = max_nodes
        self._nodes_per_match = nodes_per_match
        self._min_probability = min_probability
        self._corpus_tokens = corpus_tokens
        self._finished = SuffixAutomaton()

    def begin(self) -> _Text:
        return _Text(SuffixAutomaton(), self._finished)

    def draft(self, asked: Sequence[Asked]) -> TokenTree:
        builders, chances = [], []
        for text, tokens, depth in asked:
            self._read(text, tokens)
            candidates = [self._grow(text.own, *match, depth) for match in _own_matches(text)]
            if text.matched:
                candidates.append(self._grow(text.finished, text.in_finished, text.matched, depth))
            builder, known = TreeBuilder(text.last_token, self._max_nodes), {0: 1.0}
            for candidate in sorted(candidates, key=lambda c: -c.score):
                _merge(builder, candidate, known)
            builders.append(builder)
            chances.append([known[node] for node in range(len(builder.tokens))])
        tree = TokenTree.from_rows(builders)
        confidence = torch.zeros(tree.tokens.shape, dtype=torch.float32)
        for index, values in enumerate(chances):
            confidence[index, : len(values)] = torch.tensor(values, dtype=torch.float32)
        return replace(tree, confidence=confidence)

    def remember(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self._corpus_tokens:
            return
        if self._finished.num_states > 2 * self._corpus_tokens:
            self._finished = SuffixAutomaton()
        last = 0
        for token in tokens:
            last = self._finished.extend(last, token)

    def _read(self, text: _Text, tokens: Sequence[int]) -> None:
        if text.finished is not self._finished:  # the corpus started anew
            text.finished, text.in_finished, text.matched = self._finished, 0, 0
        for token in tokens:
            text.end = text.own.extend(text.end, token)
            text.last_token = token
            text.in_finished, text.matched = text.finished.step(text.in_finished, text.matched, token)

    def _grow(self, automaton: SuffixAutomaton, state: int, matched: int, depth: int) -> _Candidate:
        """Best-first expansion by estimated probability, the share of a state's occurrences that went on this way.

        The chance of acceptance discounts that share by how little a short match says: ``m / (m + 1)`` for a match of m
        tokens, every node being one more.
        """
        budget = int(min(self._max_nodes - 1, max(1, self._nodes_per_match * matched)))
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
                if chance >= self._min_probability:
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


def _own_matches(text: _Text) -> list[tuple[int, int]]:
    """The two longest suffixes of a text that occur earlier in it, as (state, length)."""
    matches: list[tuple[int, int]] = []
    suffix = text.own.link[text.end]
    while suffix > 0 and len(matches) < 2:
        matches.append((suffix, text.own.length[suffix]))
        suffix = text.own.link[suffix]
    return matches


def _merge(builder: TreeBuilder, candidate: _Candidate, chances: dict[int, float]) -> None:
    """Add a candidate's nodes to a tree that may hold some of them already; of two chances the better one counts."""
    place: list[int | None] = [0]
    for (parent, token), chance in zip(candidate.nodes, candidate.chances[1:], strict=True):
        at = place[parent]
        node = None if at is None else builder.add(at, token)
        place.append(node)
        if node is not None:
            chances[node] = max(chances.get(node, 0.0), chance)
