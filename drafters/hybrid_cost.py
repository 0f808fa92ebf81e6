"""What a merged tree and its parts are worth: the tokens they are expected to add against the time they take.

Passes follow one another, so time is worth what passes make of it: nodes stay in a tree, and a part is asked, where the
tokens they add exceed the time they take times the tokens per millisecond of late, in this text above all. What a part
adds is known from every pass it was asked in, since such a pass says as well what the tree without it would have had
accepted. It depends above all on how much is expected of that tree, and is kept by that. A part's time is all that
would not be taken without it: its draft, the states it has to read for it, the wider pass.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence

from specdec.latency import LatencyCurve
from specdec.planner import RUNGS, PassTimes

PROBE_SHARE = 0.008
"""Of all time, what may be spent on asking parts that are not expected to pay, lest they be misjudged for ever."""

_EXPECTED = (0.1, 0.3, 0.6, 1.0, 1.5, 2.2, 3.2, 4.5)
"""Where one class of expected accepted nodes ends and the next begins."""

_HOPES = (0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Nodes a part adds to a tree of each of these classes, before anything was seen."""

_ROOM = {2: 0.5, 4: 0.75, 8: 0.9}
"""The share of these that it adds to a tree of so many nodes at most."""

_MEMORY = 0.97
"""Weight of a pass relative to the next one."""

_PLAIN = 3.0
"""Passes of plain decoding that a text is taken to begin with."""

_SAMPLES = 5
"""Times of a part that are remembered; the lower median counts."""

_PRIOR = 3.0
"""Nodes that are taken to have come as expected before anything was seen: an unlucky start says little of a text."""

_TRIED = frozenset(RUNGS) | {2 * size for size in RUNGS} | {3 * size for size in RUNGS}
"""Numbers of nodes of a pass that are compared."""

_UNPAID = 3
"""Calls in a row in which a part never paid after its first draft, until it sits some out."""

_REST, _LONGEST_REST = 4, 16
"""Calls that it sits out then, twice as many each time it never paid again."""

_FEW = 16
"""States that take about as long to read as one."""


def class_of(expected: float) -> int:
    """The class of a tree by its expected accepted nodes."""
    return bisect_right(_EXPECTED, expected)


class Ratio:
    """How much more or less came than was expected.

    Args:
        memory: weight of an observation relative to the next one.
    """

    def __init__(self, memory: float = 0.9) -> None:
        self._memory = memory
        self._got = self._expected = 0.0

    def see(self, got: float, expected: float) -> None:
        """So much came where so much was expected."""
        self._got = self._memory * self._got + got
        self._expected = self._memory * self._expected + max(expected, 0.0)

    @property
    def factor(self) -> float:
        """1 before anything was seen."""
        return max(self._got + _PRIOR, 0.1) / (self._expected + _PRIOR)


class Gains:
    """Accepted nodes that a part adds to trees of each class; what is seen in one says a little of the others."""

    def __init__(self) -> None:
        self._sums = [0.0] * len(_HOPES)
        self._weights = [0.0] * len(_HOPES)
        self._overall = Ratio(_MEMORY)

    def at(self, kind: int) -> float:
        """Nodes to be expected; the hope, as far as hopes came true, weighs as much as two passes."""
        return (self._sums[kind] + 2.0 * _HOPES[kind] * self._overall.factor) / (self._weights[kind] + 2.0)

    def see(self, kind: int, gain: float) -> None:
        """A part added so many; fewer than none where its nodes took the place of better ones."""
        self._sums[kind] = _MEMORY * self._sums[kind] + gain
        self._weights[kind] = _MEMORY * self._weights[kind] + 1.0
        self._overall.see(gain, _HOPES[kind])


class _Part:
    """What is known of one part."""

    def __init__(self) -> None:
        self.gains = Gains()
        self.asks: deque[float] = deque(maxlen=_SAMPLES)
        self.lessons: deque[float] = deque(maxlen=_SAMPLES)
        self.long_lessons: deque[float] = deque(maxlen=_SAMPLES)  # ms per state, of many at once
        self.nodes = 0.0  # of trees it had a share in
        self.surplus = 0.0  # of passes it was not asked in, on average: below 0
        self.was_asked = self.paid = False  # in this call, where it might have been left out
        self.unpaid = 0  # calls in a row in which it was asked so and never paid
        self.rest = 0  # calls to sit out

    def ms(self, states: int = 0) -> float | None:
        """Of asking it when so many states wait to be read; None before it was asked."""
        if not self.asks:
            return None
        read = low_median(self.lessons)
        if states > _FEW and self.long_lessons:
            read = max(read, states * low_median(self.long_lessons))
        return low_median(self.asks) + read


class Economy:
    """What each part costs and adds, kept from call to call.

    Args:
        num_parts: how many parts there are.
        curve: the shape of what passes cost by nodes.
    """

    def __init__(self, num_parts: int, curve: LatencyCurve) -> None:
        self._parts = [_Part() for _ in range(num_parts)]
        self._passes = PassTimes(curve)
        self._tokens = self._ms = 0.0
        self._running = False
        self._probes_ms = 0.0  # that may be spent on parts that are not expected to pay

    def begin(self) -> None:
        """Another call, and another text: what passes of the last one made of their time says nothing of it."""
        self._tokens = self._ms = 0.0
        self._running = True

    def end(self) -> None:
        """The call is over, if there was one."""
        if not self._running:
            return
        self._running = False
        for part in self._parts:
            if part.rest:
                part.rest -= 1
            elif part.was_asked:
                part.unpaid = 0 if part.paid else part.unpaid + 1
                if part.unpaid >= _UNPAID:
                    part.rest = min(_REST << (part.unpaid - _UNPAID), _LONGEST_REST)
            part.was_asked = part.paid = False

    def rests(self, part: int) -> bool:
        """Whether a part had better sit the next call out: what it is shown has its price even if it is never asked."""
        return self._parts[part].rest > 0

    def order(self, parts: Sequence[int]) -> list[int]:
        """The parts, the cheapest first; those never asked keep their place at the front."""
        return sorted(parts, key=lambda part: self._parts[part].ms() or 0.0)

    def gain(self, part: int, expected: float, max_nodes: int) -> float:
        """Accepted nodes that a part is expected to add to a tree of so many, where one may have so many in all."""
        return self._parts[part].gains.at(class_of(expected)) * room(max_nodes)

    def rate(self, batch: int, length: int) -> float:
        """Tokens that a millisecond is worth: of late, and before that of plain decoding, as much as a few passes."""
        plain = self._passes.estimate(1, batch, length)
        if not self._passes.known:  # and no time in milliseconds either
            return batch / plain
        return (self._tokens + _PLAIN * batch) / (self._ms + _PLAIN * plain)

    def size(self, joint: Sequence[float], batch: int, length: int) -> int:
        """How many nodes beyond the roots are worth their time in the pass.

        Args:
            joint: their chances of acceptance, falling, those of all rows.
            batch: rows.
            length: of the texts, tokens.
        """
        rate, best, value, tokens = self.rate(batch, length), 0, 0.0, 0.0
        plain = self._passes.estimate(1, batch, length)
        for nodes, chance in enumerate(joint, start=1):
            tokens += chance
            if nodes + batch not in _TRIED and nodes != len(joint):
                continue
            now = tokens - rate * (self._passes.estimate(1 + nodes / batch, batch, length) - plain)
            if now > value:
                best, value = nodes, now
        return best

    def pays(
        self, part: int, gain: float, nodes: float, max_nodes: int, batch: int, length: int, states: int
    ) -> bool:  # fmt: skip
        """Whether to ask a part; as far as ``PROBE_SHARE`` goes it is asked in any case.

        Args:
            part: which one.
            gain: tokens it is expected to add, all rows together.
            nodes: of the tree without it, per row.
            max_nodes: that the tree may have.
            batch: rows.
            length: of the texts, tokens.
            states: of the target's, that the part has not read.
        """
        known = self._parts[part]
        ms = known.ms(states)
        if ms is None:
            return True
        wider = min(max(known.nodes, nodes), max_nodes)
        ms += self._passes.estimate(wider, batch, length) - self._passes.estimate(nodes, batch, length)
        surplus = gain - ms * self.rate(batch, length)
        if surplus > 0.0:
            known.paid = True
            return True
        # A trial is to say whether it would pay after all, so it is made where that is likeliest.
        likely = surplus >= known.surplus
        known.surplus += 0.1 * (surplus - known.surplus)
        self._probes_ms = min(self._probes_ms, 2.0 * ms)
        if not likely or self._probes_ms < ms:
            return False
        self._probes_ms -= ms
        return True

    def read(self, part: int, ms: float, states: int) -> None:
        """Showing a part so many states took so long."""
        known = self._parts[part]
        if states > _FEW:
            known.long_lessons.append(ms / states)
        else:
            known.lessons.append(ms)

    def asked(self, part: int, ms: float, nodes: float, first: bool = False, optional: bool = True) -> None:
        """Asking a part took so long, and the tree had so many nodes then.

        Args:
            part: which one.
            ms: time it took.
            nodes: of the tree with it, per row.
            first: it is the first time in this call, and it may have read the prompt: that says at most that asking
                takes no longer.
            optional: it might have been left out, for there were others, and a clock may decide.
        """
        known = self._parts[part]
        known.was_asked |= optional
        if not first or (known.asks and ms < low_median(known.asks)):
            known.asks.append(ms)
        known.nodes += 0.2 * (nodes - known.nodes) if known.nodes else nodes

    def added(self, part: int, expected: float, max_nodes: int, gain: float) -> None:
        """A part added so many accepted nodes to a row's tree, of which so many were expected without it."""
        self._parts[part].gains.see(class_of(expected), gain / room(max_nodes))

    def passed(self, nodes: float, batch: int, length: int, pass_ms: float, all_ms: float, tokens: float) -> None:
        """A pass: nodes per row, its time alone and with all drafting, and the tokens of all rows."""
        self._passes.observe(nodes, batch, length, pass_ms)
        self._tokens = _MEMORY * self._tokens + tokens
        self._ms = _MEMORY * self._ms + all_ms
        self._probes_ms += PROBE_SHARE * all_ms


def room(max_nodes: int) -> float:
    """The share of what a part adds to a tree of any size that it adds where there may be so many nodes."""
    sizes = list(_ROOM)
    place = bisect_left(sizes, max_nodes)
    return _ROOM[sizes[place]] if place < len(sizes) else 1.0


def low_median(values: Sequence[float]) -> float:
    """The median, of two the lower; 0 of none."""
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0
