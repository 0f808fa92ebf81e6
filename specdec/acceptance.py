"""What is accepted of trees of each size: observed of trees that were checked, and of others that were not."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import truediv

from specdec.batch import Row
from specdec.planner import RUNGS
from specdec.tree import TokenTree

_MEMORY = 0.9
"""Weight of a pass relative to the next one."""

_CALIBRATED = 3.0
"""Passes that a calibration weighs as much as, where a mere hope weighs as one: an unlucky start says little."""

_FADING = 0.98
"""The same for what was seen before a pass that drafted nothing: texts change."""

_HOPE_PER_DOUBLING = 0.6
"""Accepted nodes per doubling of the tree, where no calibration says what to expect."""

_ENOUGH = 4
"""Nodes written as drafted after which it need not be waited for more."""

_LONG_MEMORY = 0.98
"""Weight of a pass relative to the next one, in what is known of all texts."""

_PRIOR = 3.0
"""Nodes taken to have been accepted as expected before there were texts."""

_FIRST_DRAFTS = 8
"""Of each row, that say what to expect of the next text."""


class Acceptance:
    """Expected accepted nodes of one row by size of the tree.

    Args:
        hopes: what to expect of each of ``RUNGS`` before anything was seen; a guess where None.
        weight: passes that this weighs as much as.
    """

    def __init__(self, hopes: Sequence[float] | None = None, weight: float = 1.0) -> None:
        hopes = hopes or [_HOPE_PER_DOUBLING * math.log2(size) for size in RUNGS]
        # Of the accepted nodes that a size has and the next smaller one has not.
        self._sums = [0.0, *(weight * (more - less) for less, more in pairwise(hopes))]
        self._weights = [weight] * len(RUNGS)

    def see(self, columns: Sequence[int], known: int) -> None:
        """How a tree's accepted nodes stand, and up to which size it says what would have been accepted.

        Of larger sizes it is assumed that they had as much more, or less, than expected.
        """
        end = bisect_right(RUNGS, known)  # the first size that is not known
        hits = [0.0] * len(RUNGS)
        for column in columns:
            hits[bisect_right(RUNGS, column)] += 1.0
        if end < len(RUNGS):
            expected = self.by_size()[end - 1]
            surprise = min(sum(hits[:end]) / expected, 2.0) if expected > 0 else 1.0
            hits[end:] = [surprise * s / w for s, w in zip(self._sums[end:], self._weights[end:], strict=True)]
        self._sums = [_MEMORY * value + hit for value, hit in zip(self._sums, hits, strict=True)]
        self._weights = [_MEMORY * value + 1.0 for value in self._weights]

    def fade(self, passes: int) -> None:
        """In so many passes nothing was drafted: what was seen before counts less from now on."""
        left = _FADING**passes
        self._sums = [left * value for value in self._sums]
        self._weights = [left * value for value in self._weights]

    def by_size(self) -> list[float]:
        """Expected accepted nodes of trees of each of ``RUNGS``."""
        return list(accumulate(map(truediv, self._sums, self._weights)))


MOST_SAVED = 10.0
"""Plain passes' time that earlier calls can leave for later ones to lose, and that there is before the first one."""


class Experience:
    """What texts begin like, and what trying may cost: how much of the first drafts of earlier ones was accepted, of
    what was expected, and what was gained and lost by them.

    Of drafts only how much: which sizes are worth it differs from text to text, and a text that repeats itself would be
    found out late where trees are cut to what others made use of.

    Args:
        hopes: accepted nodes to expect of trees of each of ``RUNGS``, as calibrated; None where nothing was.
    """

    def __init__(self, hopes: Sequence[float] | None = None) -> None:
        self._weight = _CALIBRATED if hopes else 1.0
        self._hopes = Acceptance(hopes).by_size()
        self._got = self._expected = _PRIOR
        self.saved = MOST_SAVED
        """Plain passes' time: what is left of that which calls gained, once all that they lost is paid."""
        self.whole_width = 0.0
        """Nodes of a row's tree where trees come whole or not at all; 0 where they do not, or nobody knows."""

    def new_row(self) -> Acceptance:
        """What to expect of another text."""
        share = self._got / self._expected
        return Acceptance([share * hope for hope in self._hopes], self._weight)

    def settle(self, gained: float) -> None:
        """A call gained so many plain passes' time, or lost it."""
        self.saved = min(max(self.saved + gained, 0.0), MOST_SAVED)

    def see(self, drafts: int, accepted: int, nodes: float) -> None:
        """Of a tree of so many nodes so many were accepted, in a row of which so many drafts were seen before."""
        if drafts < _FIRST_DRAFTS:
            expected = self._hopes[min(bisect_left(RUNGS, nodes), len(RUNGS) - 1)]
            self._got = _PRIOR + _LONG_MEMORY * (self._got - _PRIOR) + accepted
            self._expected = _PRIOR + _LONG_MEMORY * (self._expected - _PRIOR) + expected


class _Followed:
    """One row's tree, and how far the text has come in it."""

    def __init__(self, parents: Sequence[int], tokens: Sequence[int], standing: Sequence[int]) -> None:
        self._children = {
            (parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))
        }
        self._standing, self._node = standing, 0
        self.accepted: list[int] = []

    def follow(self, token: int) -> bool:
        """Whether the text goes on as drafted, and more of it has to be seen."""
        node = self._children.get((self._node, token))
        if node is None:
            return False
        self._node = node
        self.accepted.append(self._standing[node])
        return len(self.accepted) < _ENOUGH


class HeldDraft:
    """Trees that no pass checks, held against the tokens that plain decoding writes.

    Where a text does not depend on trees, these say what a pass would have accepted, for the price of the draft.

    Args:
        rows: whose trees they are.
        tree: of all of them.
        known: up to which size it says what would have been accepted.
    """

    def __init__(self, rows: Sequence[Row], tree: TokenTree, known: int) -> None:
        self.known, self.nodes = known, tree.mean_nodes
        parts = zip(rows, tree.parents.tolist(), tree.tokens.tolist(), tree.standing.tolist(), strict=True)
        self._open = {row.row_id: _Followed(*part) for row, *part in parts}

    def follow(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> dict[int, list[int]]:
        """How the nodes stand that would have been accepted, by row id of those of which it is known now.

        Args:
            rows: that were decoded; others have ended.
            tokens: that each of them emitted.
        """
        known = {}
        still = {row.row_id for row in rows}
        self._open = {row_id: each for row_id, each in self._open.items() if row_id in still}
        for row, emitted in zip(rows, tokens, strict=True):
            each = self._open.get(row.row_id)
            if each is not None and not all(map(each.follow, emitted)):
                known[row.row_id] = each.accepted
                del self._open[row.row_id]
        return known

    @property
    def settled(self) -> bool:
        """Whether nothing of it is open."""
        return not self._open
