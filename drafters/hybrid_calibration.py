"""What a part's proposals are worth, learnt from the passes: scores of different drafters on one scale.

Every pass says what the target chose at each node it went through, so all children of these nodes, checked or only
proposed, were right or wrong. A chance is corrected in steps, each by the odds observed over the odds claimed so far:
by the part's own confidence, by depth and rank, by how the part does in this text, and, where several parts spoke on
the same place, by who agreed with whom. Few observations correct little.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TypeVar

K = TypeVar("K")

RANKS = (0.45, 0.15, 0.08, 0.05, 0.03)
"""Chance of a node of each rank among its siblings, of parts that give no confidence; the last for all beyond."""

LEAST, MOST = 1e-4, 0.98
"""Bounds of a chance."""

_CONFIDENCES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Where one class of confidences ends and the next begins."""

_DEEPEST, _LAST_RANK = 6, 3
"""Depths and ranks beyond count as these."""


class Odds:
    """Hits and misses, and those claimed: corrects further claims by their ratio.

    Args:
        strength: observations that the claims themselves weigh.
        memory: weight of an observation relative to the next one.
    """

    def __init__(self, strength: float = 6.0, memory: float = 0.998) -> None:
        self._strength = strength
        self._memory = memory
        self._hits = self._misses = 0.0
        self._claimed_hits = self._claimed_misses = 0.0

    def see(self, chance: float, hit: bool) -> None:
        """Something claimed to have this chance was right, or not."""
        memory = self._memory
        self._hits = memory * self._hits + hit
        self._misses = memory * self._misses + (not hit)
        self._claimed_hits = memory * self._claimed_hits + chance
        self._claimed_misses = memory * self._claimed_misses + 1.0 - chance

    def correct(self, chance: float) -> float:
        """The chance with its odds multiplied by observed odds over claimed odds."""
        strength = self._strength
        up = chance * (self._hits + strength) / (self._claimed_hits + strength)
        down = (1.0 - chance) * (self._misses + strength) / (self._claimed_misses + strength)
        return min(max(up / (up + down), LEAST), MOST)


class PartCalibration:
    """The chances of one part's proposals, given that their parent is right."""

    def __init__(self) -> None:
        self._by_confidence: dict[int, Odds] = {}
        self._by_place: dict[tuple[int, int], Odds] = {}

    def chance(self, confidence: float | None, depth: int, rank: int) -> float:
        """Of a node at a depth (1 for the root's children) and a rank among its siblings (0 for the first).

        Args:
            confidence: the part's own, given its parent; None where it has none.
            depth: of the node.
            rank: of the node.
        """
        claim = first_claim(confidence, rank)
        for odds in self._steps(claim, depth, rank):
            claim = odds.correct(claim)
        return claim

    def see(self, confidence: float | None, depth: int, rank: int, hit: bool) -> None:
        """Such a node was the target's choice at its parent, or not."""
        claim = first_claim(confidence, rank)
        for odds in self._steps(claim, depth, rank):
            corrected = odds.correct(claim)
            odds.see(claim, hit)
            claim = corrected

    def _steps(self, claim: float, depth: int, rank: int) -> tuple[Odds, Odds]:
        return (
            _odds_at(self._by_confidence, bisect_right(_CONFIDENCES, claim)),
            _odds_at(self._by_place, (min(depth, _DEEPEST), min(rank, _LAST_RANK))),
        )


def _odds_at(known: dict[K, Odds], key: K) -> Odds:
    """A step's odds, made where nothing was seen; in every draft for every node, so not a ``setdefault``."""
    found = known.get(key)
    if found is None:
        found = known[key] = Odds()
    return found


def first_claim(confidence: float | None, rank: int) -> float:
    """A part's own confidence, or what its rank promises."""
    chance = RANKS[min(rank, len(RANKS) - 1)] if confidence is None else confidence
    return min(max(chance, LEAST), MOST)


def agreed(chances: list[float]) -> float:
    """The chance of what several parts propose, each by itself of these chances: one of them is right (noisy-or)."""
    return min(1.0 - math.prod(1.0 - chance for chance in chances), MOST)


class Agreement:
    """Corrects chances where several parts spoke on one place, by who proposed the node and who proposed others."""

    def __init__(self) -> None:
        self._odds: dict[tuple[int, int, int], Odds] = {}

    def chance(self, claim: float, proposers: int, others: int) -> float:
        """Of a node proposed by some parts while others proposed only siblings of it; sets of parts as bits."""
        odds = self._find(claim, proposers, others)
        return claim if odds is None else odds.correct(claim)

    def see(self, claim: float, proposers: int, others: int, hit: bool) -> None:
        """Such a node was the target's choice at its parent, or not."""
        odds = self._find(claim, proposers, others)
        if odds is not None:
            odds.see(claim, hit)

    def _find(self, claim: float, proposers: int, others: int) -> Odds | None:
        if (proposers | others).bit_count() < 2:
            return None
        return _odds_at(self._odds, (proposers, others, bisect_right(_CONFIDENCES, claim)))


class Calibration:
    """All that is learnt of some parts' proposals for one way of choosing tokens.

    Args:
        num_parts: how many parts there are.
    """

    def __init__(self, num_parts: int) -> None:
        self.parts = [PartCalibration() for _ in range(num_parts)]
        self.agreement = Agreement()


def row_odds(num_parts: int) -> list[Odds]:
    """How much better or worse than elsewhere each part does in one text, the recent part of it above all."""
    return [Odds(strength=4.0, memory=0.97) for _ in range(num_parts)]
