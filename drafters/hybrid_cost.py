"""Whether another part is worth asking: the tokens it is expected to add against the time it takes.

Passes follow one another, so time is worth what passes make of it: a part is asked where the tokens it adds exceed the
time it takes times the tokens per millisecond of late. What a part adds is known from every pass it was asked in, since
such a pass says as well what the tree without it would have had accepted. It depends above all on how much is expected
of that tree, and is kept by that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from specdec.latency import LatencyCurve
from specdec.planner import PassTimes

_EXPECTED = (0.1, 0.3, 0.6, 1.0, 1.5, 2.2, 3.2, 4.5)
"""Where one class of expected accepted nodes ends and the next begins."""

_HOPES = (0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Nodes a part adds to a tree of each of these classes, before anything was seen; weighs as much as two passes."""

_MEMORY = 0.97
"""Weight of a pass relative to the next one."""

_FIRST_GAP, _LONGEST_GAP = 8, 64
"""Passes a part is not asked in before it is tried again; doubled after each try."""

_SAMPLES = 5
"""Times of a part that are remembered; the lower median counts."""


def class_of(expected: float) -> int:
    """The class of a tree by its expected accepted nodes."""
    return bisect_right(_EXPECTED, expected)


class Gains:
    """Accepted nodes that a part adds to trees of each class."""

    def __init__(self) -> None:
        self._sums = [2.0 * hope for hope in _HOPES]
        self._weights = [2.0] * len(_HOPES)

    def at(self, kind: int) -> float:
        """Nodes to be expected."""
        return self._sums[kind] / self._weights[kind]

    def see(self, kind: int, gain: float) -> None:
        """A part added so many; fewer than none where its nodes took the place of better ones."""
        self._sums[kind] = _MEMORY * self._sums[kind] + gain
        self._weights[kind] = _MEMORY * self._weights[kind] + 1.0


class RowGain:
    """How much more or less a part adds to one text than to others."""

    def __init__(self) -> None:
        self._got = self._expected = 0.0

    def see(self, gain: float, expected: float) -> None:
        """It added so many nodes where so many were expected."""
        self._got = 0.9 * self._got + gain
        self._expected = 0.9 * self._expected + max(expected, 0.0)

    @property
    def factor(self) -> float:
        """1 before anything was seen."""
        return max(self._got + 1.0, 0.1) / (self._expected + 1.0)


class _Part:
    """What is known of one part."""

    def __init__(self, num_kinds: int) -> None:
        self.gains = Gains()
        self.asks: deque[float] = deque(maxlen=_SAMPLES)
        self.lessons: deque[float] = deque(maxlen=_SAMPLES)
        self.skipped = [0] * num_kinds
        self.gaps = [_FIRST_GAP] * num_kinds
        self.nodes = 0.0  # of trees it had a share in

    @property
    def ms(self) -> float | None:
        """Of asking it, and of showing it the pass; None before it was asked."""
        if not self.asks:
            return None
        return _low_median(self.asks) + (_low_median(self.lessons) if self.lessons else 0.0)


class Economy:
    """What each part costs and adds, kept from call to call.

    Args:
        num_parts: how many parts there are.
        curve: the shape of what passes cost by nodes.
    """

    def __init__(self, num_parts: int, curve: LatencyCurve) -> None:
        self._parts = [_Part(len(_HOPES)) for _ in range(num_parts)]
        self._passes = PassTimes(curve)
        self._tokens = self._ms = 0.0

    def order(self, parts: Sequence[int]) -> list[int]:
        """The parts, the cheapest first; those never asked keep their place at the front."""
        return sorted(parts, key=lambda part: self._parts[part].ms or 0.0)

    def gain(self, part: int, expected: float) -> float:
        """Accepted nodes that a part is expected to add to a tree of so many."""
        return self._parts[part].gains.at(class_of(expected))

    def pays(self, part: int, gain: float, expected: float, nodes: int, batch: int, length: int) -> bool:
        """Whether to ask a part; now and then it is asked in any case.

        Args:
            part: which one.
            gain: tokens it is expected to add, all rows together.
            expected: accepted nodes of the tree without it, the mean of the rows.
            nodes: of that tree, per row.
            batch: rows.
            length: of the texts, tokens.
        """
        known, kind = self._parts[part], class_of(expected)
        ms = known.ms
        if ms is None or not self._ms:
            return True
        if self._passes.known:
            wider = max(known.nodes, nodes)
            ms += self._passes.estimate(wider, batch, length) - self._passes.estimate(nodes, batch, length)
        if gain > ms * self._tokens / self._ms:
            known.skipped[kind], known.gaps[kind] = 0, _FIRST_GAP
            return True
        known.skipped[kind] += 1
        if known.skipped[kind] <= known.gaps[kind]:
            return False
        known.skipped[kind], known.gaps[kind] = 0, min(2 * known.gaps[kind], _LONGEST_GAP)
        return True

    def asked(self, part: int, ms: float, nodes: int, first: bool) -> None:
        """Asking a part took so long, and the tree had so many nodes then; the first time of a call it reads the
        prompt, which is not counted unless nothing else is known."""
        known = self._parts[part]
        if not first or not known.asks or ms < _low_median(known.asks):
            known.asks.append(ms)
        known.nodes += 0.2 * (nodes - known.nodes) if known.nodes else nodes

    def taught(self, part: int, ms: float) -> None:
        """Showing a part a pass that it was asked for took so long."""
        self._parts[part].lessons.append(ms)

    def added(self, part: int, expected: float, gain: float) -> None:
        """A part added so many accepted nodes to a row's tree."""
        self._parts[part].gains.see(class_of(expected), gain)

    def passed(self, nodes: int, batch: int, length: int, pass_ms: float, all_ms: float, tokens: float) -> None:
        """A pass: nodes per row, its time alone and with all drafting, and the tokens of all rows."""
        self._passes.observe(nodes, batch, length, pass_ms)
        self._tokens = _MEMORY * self._tokens + tokens
        self._ms = _MEMORY * self._ms + all_ms


def _low_median(values: deque[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
