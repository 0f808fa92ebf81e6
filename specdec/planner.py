"""How many nodes the next tree should have: the arithmetic, and what a pass is known to cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from specdec.latency import LatencyCurve

RUNGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Sizes of trees told apart."""

CAUTIOUS_CPU = LatencyCurve.simple({1: 1.0, 4: 1.6, 8: 2.0, 16: 2.2, 32: 2.7, 64: 3.8})
"""A pass by rows in units of a plain one, where nothing was measured yet: float32 in eager mode on two cores, the
steepest seen. Other precisions are flatter, which the first passes show."""

CAUTIOUS_GPU = LatencyCurve.simple({1: 1.0, 16: 1.1, 64: 1.3, 256: 2.0, 512: 3.2})
"""The same for a device that waits for its memory, not for its arithmetic."""

_SAMPLES = 5
"""Passes of about the same width that are remembered."""

SPIKE = 1.5
"""Times what a pass usually takes, beyond which its time is the machine's affair."""

_MEMORY = 0.9
"""Weight of a pass relative to the next one of its width, in what passes take on average."""


_FORGETTING = 0.5
"""What a draft is taken to cost after a call without one."""


@dataclass(frozen=True)
class Budget:
    """The best size of a tree.

    Attributes:
        nodes: root included; 1 is plain decoding.
        speedup: expected tokens per millisecond over plain decoding's, at least 1.
    """

    nodes: int
    speedup: float


def best_budget(
    sizes: Iterable[int], tau: Callable[[int], float], latency: Callable[[int], float], draft: Callable[[int], float]
) -> Budget:
    """argmax over n of ``tau(n) / (latency(n) + draft(n))``; of equals the smallest.

    Args:
        sizes: numbers of nodes to choose among; 1, where drafting costs nothing and tau is 1, is always among them.
        tau: expected tokens of a pass over n nodes, bonus token included.
        latency: milliseconds of such a pass.
        draft: milliseconds of drafting the tree.

    Raises:
        ValueError: where a size is below 1 or a time not positive.
    """
    plain = latency(1)
    best = Budget(1, 1.0)
    for nodes in sorted({*sizes} | {1}):
        ms = latency(nodes) + (draft(nodes) if nodes > 1 else 0.0)
        if nodes < 1 or not (math.isfinite(ms) and ms > 0):
            raise ValueError(f"a tree of {nodes} nodes takes {ms} ms: sizes start at 1 and times are positive")
        speedup = tau(nodes) * plain / ms if nodes > 1 else 1.0
        if speedup > best.speedup:
            best = Budget(nodes, speedup)
    return best


class PassTimes:
    """What passes cost, from a curve's shape corrected by the passes that were run.

    Rows are what counts: a batch of 4 with 2 nodes each is as wide as one row of 8. Each pass tells by how much the
    curve is off at about its width; between the widths seen the correction is interpolated, so that one pass suffices
    to give the curve its scale.

    Args:
        curve: milliseconds or any other unit; a profile of this machine, or a cautious guess.
        learn: correct it; otherwise the curve is taken as it is.
    """

    def __init__(self, curve: LatencyCurve, learn: bool = True) -> None:
        self._curve = curve
        self._learn = learn
        self._factors: dict[int, deque[float]] = {}  # by rung of the pass's rows: time over the curve's
        self._usual: dict[int, float] = {}  # their medians: asked for many times per pass
        self._mean: dict[int, float] = {}
        self._rungs: list[int] = []
        self._estimates: dict[tuple[float, int, int], float] = {}  # since the last pass that taught something
        self._drafts: deque[float] = deque(maxlen=_SAMPLES)
        self._first_drafts: deque[float] = deque(maxlen=_SAMPLES)
        self._idle = False  # whether nothing was drafted in the call so far
        self._discount = 1.0  # on what drafts took
        self._delays: deque[float] = deque(maxlen=_SAMPLES)

    def observe(self, nodes: float, batch: int, length: int, ms: float) -> None:
        """A pass over ``nodes`` nodes per row took so long."""
        if self._learn:
            factor, rung = ms / self._curve.at(nodes, batch, length), _rung(nodes * batch)
            seen = self._factors.setdefault(rung, deque(maxlen=_SAMPLES))
            known = len(seen) == _SAMPLES
            seen.append(factor)
            self._usual[rung] = usual = _low_median(seen)
            recent = min(factor, SPIKE * usual)
            self._mean[rung] = _MEMORY * self._mean[rung] + (1 - _MEMORY) * recent if known else usual
            self._rungs = sorted(self._factors)
            self._estimates.clear()

    @property
    def learns(self) -> bool:
        """Whether passes correct the curve."""
        return self._learn

    def begin_call(self) -> None:
        """A call begins. Where the last one had no draft, drafts are taken to cost half of what they did, down to a
        quarter and until one is made: a slow spell must not end drafting for good.
        """
        if self._idle:
            self._discount = max(_FORGETTING * self._discount, _FORGETTING**2)
        self._idle = True
        self._estimates.clear()  # without passes that teach something they would only grow

    def observe_draft(self, ms: float, first: bool = False) -> None:
        """Drafting a tree took so long; a call's ``first`` draft reads the prompt as well."""
        self._idle, self._discount = False, 1.0
        if first and self._drafts:  # a decoder's very first draft is another matter: much is done for the first time
            self._first_drafts.append(ms)
        if not first or (self._drafts and ms < self.draft_ms):
            self._drafts.append(ms)

    @property
    def first_draft_ms(self) -> float:
        """Milliseconds of a call's first draft; 0 before there was one."""
        return self._discount * _low_median(self._first_drafts) if self._first_drafts else 0.0

    @property
    def draft_ms(self) -> float:
        """Milliseconds of drafting a tree; 0 before the first."""
        return self._discount * _low_median(self._drafts) if self._drafts else 0.0

    def observe_after_draft(self, batch: int, length: int, ms: float) -> None:
        """The plain pass after a draft took so long."""
        if self._learn:
            self._delays.append(max(ms - self.estimate(1, batch, length), 0.0))

    @property
    def delay_ms(self) -> float:
        """Milliseconds that a draft delays the plain pass after it, with less of the target's weights in the caches."""
        return _low_median(self._delays) if self._delays else 0.0

    def knows(self, nodes: int, batch: int) -> bool:
        """Whether passes of about this width were run, or need not be."""
        return not self._learn or _rung(nodes * batch) in self._factors

    @property
    def known(self) -> bool:
        """Whether there is a time in milliseconds at all."""
        return not self._learn or bool(self._factors)

    def estimate(self, nodes: float, batch: int, length: int) -> float:
        """Milliseconds of a pass; in the curve's unit before the first one."""
        asked = nodes, batch, length
        if asked not in self._estimates:
            self._estimates[asked] = self._curve.at(nodes, batch, length) * self._factor(nodes * batch)
        return self._estimates[asked]

    def average(self, nodes: int, batch: int, length: int) -> float:
        """Milliseconds of such a pass on average: where others use the machine too, more than ``estimate`` has."""
        estimate, rung = self.estimate(nodes, batch, length), _rung(nodes * batch)
        return estimate * self._mean[rung] / self._usual[rung] if rung in self._mean else estimate

    def _factor(self, rows: float) -> float:
        rungs = self._rungs
        if not rungs:
            return 1.0
        right = bisect_left(rungs, rows)
        if right == len(rungs) or right == 0 or rungs[right] == rows:
            return self._usual[rungs[min(right, len(rungs) - 1)]]
        low, high = rungs[right - 1], rungs[right]
        share = math.log(rows / low) / math.log(high / low)
        return (1 - share) * self._usual[low] + share * self._usual[high]


def _rung(rows: float) -> int:
    return RUNGS[min(bisect_left(RUNGS, rows), len(RUNGS) - 1)]


def _low_median(values: deque[float]) -> float:
    """The median, of two the lower: a pass that is run for the first time is slow."""
    return sorted(values)[(len(values) - 1) // 2]
