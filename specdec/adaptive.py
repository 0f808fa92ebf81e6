"""Trees as large as they pay, down to plain decoding and back, from what is observed while decoding.

Three parts decide the next tree's size:

- *what a larger tree is worth*: nodes of a tree stand in order of promise, so a pass also says what the verdict on any
  smaller tree would have been. Per row and size, a running mean of accepted nodes gives tau(n);
- *what it costs*: ``PassTimes``, from the passes themselves, sharpened by a profile where there is one;
- *what may be lost*: an account of the time gained and lost against plain decoding. A tree that could overdraw it is
  not drafted, so that no text, whatever it is, takes more than ``SHARE`` longer than plain decoding, and ``CREDIT``
  passes once per call. That credit is what earlier calls have left (``Experience.saved``): where none of them gains by
  drafts, it is soon ``LEAST_CREDIT``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from specdec.acceptance import Acceptance, Experience, HeldDraft
from specdec.batch import Row
from specdec.planner import RUNGS, SPIKE, PassTimes, best_budget
from specdec.policy import NO_LIMIT
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

SHARE = 0.01
"""Of the time of plain decoding, what may be lost in trying."""

CREDIT = 2.5
"""Plain passes' time that a call may lose before anything was gained, at most."""

LEAST_CREDIT = 0.5
"""The same at least, whatever earlier calls lost: enough to try small trees of cheap drafts."""

UNMEASURED = 1.5
"""The same while it is a guess what a plain pass takes."""

_MEMORY = 0.9
"""Weight of a pass relative to the next one."""

_FIRST_GAP, _LONGEST_GAP = 4, 64
"""Passes between trials of larger trees; doubled after each that changed nothing."""

_LONGEST_REST = 16
"""Passes at most for which nothing is decided: what passes and drafts take may change."""

_STEP = 4
"""Times the nodes that are best that a trial has at most."""

_TRIED = 16
"""Nodes that a trial may have in any case, of all rows together."""

_HOPED = 1.5
"""Times the accepted nodes expected of a larger tree; were it not better even with these, it is not tried."""

_UNCHECKED = 8
"""Passes that may speculate before plain ones are run to compare with."""

_RECHECKED = 48
"""The same once there were, of several rows: there drafts gain little, and what a plain pass takes changes."""

_HEAD_START = 50
"""Passes for which ``SHARE`` is at hand from the start, for drafts that no pass checks."""

_COMPARED = 3
"""Plain passes run to compare with. The first one's time is another matter: a draft leaves less of the target's weights
in the caches than plain decoding does, by a tenth of a pass, or a third where passes are short."""


class _Offer(NamedTuple):
    """A budget's expected tokens, and what a pass takes: on average, as many trees are smaller, and at most."""

    tokens: float
    mean_ms: float
    worst_ms: float


class _Draft(NamedTuple):
    """A pass that speculated, or what learning from plain ones cost (0 tokens, 0 nodes)."""

    tokens: float
    nodes: float  # per row
    batch: int
    length: int
    draft_ms: float
    pass_ms: float = 0.0


@dataclass
class _KnownRow:
    """What was observed of a row, of how many drafts, and after how many plain passes."""

    acceptance: Acceptance
    plain: int
    drafts: int = 0


class AdaptiveTrees:
    """The policy of one call.

    Args:
        times: what passes cost; kept by the decoder from call to call.
        experience: what to expect before anything was seen; kept likewise.
        uneven: whether rows of a batch take only the nodes they have; else each takes as many as the largest.
        foretells: whether texts do not depend on trees and drafts need no passes of their own, so that a draft may be
            tried without a pass.
    """

    def __init__(
        self, times: PassTimes, experience: Experience | None = None, uneven: bool = True, foretells: bool = False
    ) -> None:
        self._times, self._experience, self._uneven = times, experience or Experience(), uneven
        self._foretells = foretells
        self._credit = min(max(self._experience.saved, LEAST_CREDIT), CREDIT)
        self._held: HeldDraft | None = None
        self._watched = 0.0  # what held drafts took, in plain passes
        self._doubtful: bool | None = None  # whether at first drafts are not expected to pay; None while it is a guess
        self._rows: dict[int, _KnownRow] = {}
        whole = self._experience.whole_width
        self._width = whole  # of the trees that the drafter makes, on average; 0 before one came uncut
        self._widest: float = whole or RUNGS[-1]  # of these
        self._whole = whole > 0.0  # trees come whole or not at all
        self._asked = 1  # the last budget
        self._trial_over: int | None = None  # the size that would have been chosen, while a larger one is tried
        self._speculates = True
        self._gap = self._wait = _FIRST_GAP
        self._passes = self._plain = self._drafts = 0
        self._unchecked = 0  # passes that speculated since a plain one
        self._comparing = 0  # plain passes still to be run to compare with
        self._timed_plain = False  # whether the time of a plain pass was taken
        self._after_draft = False  # whether the last pass speculated
        self._resting = False  # whether the last budget was given without a thought
        self._rested_ms = 0.0  # what learning cost in passes of which nothing else was noted
        self._gained = 0.0  # in plain passes, as far as settled
        self._settled = 0  # passes until then
        self._open: list[_Draft] = []  # not settled while the time of a plain pass is a guess
        self._why_not = ""
        self.reason: str | None = None
        self.beside = 1
        self._begun = False

    @property
    def trying(self) -> bool:
        return self._trial_over == 1

    def budget(self, rows: Sequence[Row], most: int = NO_LIMIT) -> int:
        if not self._begun:
            self._begun = True
            self._times.begin_call()
        self._trial_over, self.beside = None, 1
        self._resting = self._held is None and not self._speculates and self._wait > 0
        if self._resting:  # nothing is learnt meanwhile
            self._wait -= 1
            self._asked, self.reason = 1, self._why_not
            return 1
        self._size, self._length = len(rows), sum(len(row.tokens) for row in rows) // len(rows)
        if self._held is not None:
            self._asked, self.reason = 1, self._why_not
            return 1
        self.reason = None
        self._asked = min(self._decide(rows), most)
        return self._asked

    def _decide(self, rows: Sequence[Row]) -> int:
        if self._unchecked >= (_RECHECKED if self._comparable else _UNCHECKED):
            self._unchecked, self._comparing = 0, _COMPARED
        if self._comparing:
            self.reason = "a plain pass, to compare with"
            return 1
        offer = self._offers(rows)
        if self._doubtful is None and self._comparable:
            self._doubtful = self._credit < CREDIT or self._best(offer, list(offer)) == 1
        sizes = self._affordable(offer)
        best = self._best(offer, sizes)
        if (best > 1) != self._speculates:
            self._speculates = best > 1
            self._gap = self._wait = _FIRST_GAP
        if best == sizes[-1] > 1 or (best > 1 and self._whole):
            return best
        tried = max(_STEP * best, _TRIED // self._size)
        larger = [size for size in sizes if best < size <= tried]
        if best > 1:
            larger = [size for size in larger if self._rate(offer[size], _HOPED) > self._rate(offer[best])]
        elif self._foretells:  # a pass is tried where only the draft is too dear
            larger = [size for size in larger if offer[size].tokens * offer[1].mean_ms >= offer[size].mean_ms]
        if self._wait == 0 and larger:
            self._trial_over = best
            return larger[-1]
        if best == 1:
            self.reason = self._why_not = self._explain(offer, sizes)
            held = max((size for size in offer if 1 < size <= tried), default=1) if self._foretells else 1
            if held > 1 and self._wait == 0 and self._draft_ms <= self._to_watch * offer[1].worst_ms:
                self._trial_over, self.beside = best, held
                return best
        self._wait = max(self._wait - 1, 0)
        if best == 1 and not larger:
            self._wait = max(self._wait, self._passes_to_rest(offer))
        return best

    @property
    def _comparable(self) -> bool:
        """Whether it is known what a plain pass takes, of about this batch or at least of another one."""
        return self._times.knows(1, self._size) or self._timed_plain

    def _offers(self, rows: Sequence[Row]) -> dict[int, _Offer]:
        """What can be had, by size, up to a little more than the largest trees that the drafter makes."""
        sizes = [1, *(size for below, size in pairwise(RUNGS) if below <= self._widest)]
        known = [self._known(row.row_id).acceptance.by_size() for row in rows]
        tau = [1.0 + sum(values) / len(rows) for values in zip(*known, strict=True)]
        if self._whole:
            tau[1 : len(sizes)] = [tau[len(sizes) - 1]] * (len(sizes) - 1)
        times = {float(n): self._times.estimate(n, self._size, self._length) for n in (*sizes, self._widest)}
        usual = self._times.estimate(self._width, self._size, self._length) if self._width else 0.0
        found = {1: _Offer(1.0, times[1], times[1])}
        for size, tokens in zip(sizes[1:], tau[1:], strict=False):
            worst = times[self._widest if self._whole else min(size, self._widest)]
            mean = usual if usual and (self._whole or self._width < size) else worst
            found[size] = _Offer(tokens, mean, worst)
        return found

    def _affordable(self, offers: dict[int, _Offer]) -> list[int]:
        """Sizes of which a pass could accept nothing without overdrawing the account."""
        most = (1.0 + self.balance) * offers[1].worst_ms - self._draft_ms
        return [size for size, offer in offers.items() if size == 1 or offer.worst_ms <= most]

    @property
    def _draft_ms(self) -> float:
        """What the next draft takes, and by how much it delays the plain pass that follows a trial."""
        return self._usual_draft_ms if self._speculates else self._usual_draft_ms + self._times.delay_ms

    @property
    def _usual_draft_ms(self) -> float:
        """What drafts take; 0 before a call's first one, which is always made where drafts are expected to pay."""
        if self._drafts:
            return self._times.draft_ms
        return self._times.first_draft_ms if self._doubtful else 0.0

    @property
    def _to_watch(self) -> float:
        """What a draft that no pass checks may cost, in plain passes."""
        return min(SHARE * (self._passes + _HEAD_START) - self._watched, self.balance)

    def _passes_to_rest(self, offers: dict[int, _Offer]) -> int:
        """Until a draft may be made, as ``SHARE`` of each pass adds to what may be lost."""
        if not self._comparable:
            return _FIRST_GAP  # then more may be
        plain_ms = offers[1].worst_ms
        if self._foretells:
            missing = self._draft_ms / plain_ms - self._to_watch
        else:
            least = min((offer.worst_ms for size, offer in offers.items() if size > 1), default=plain_ms)
            missing = (least + self._draft_ms) / plain_ms - 1.0 - self.balance
        return min(max(math.ceil(missing / SHARE), _FIRST_GAP), _LONGEST_REST)

    def _best(self, offers: dict[int, _Offer], sizes: Sequence[int]) -> int:
        draft_ms = self._times.draft_ms
        best = best_budget(sizes, lambda n: offers[n].tokens, lambda n: offers[n].mean_ms, lambda _: draft_ms).nodes
        # Where the drafter makes no larger trees as a rule, a limit would only cut those that promise more than usual.
        return sizes[-1] if best > 1 and best >= self._width > 0 else best

    def _rate(self, offer: _Offer, hope: float = 1.0) -> float:
        """Tokens per millisecond of a tree, were ``hope`` times as many nodes accepted as expected."""
        return (1.0 + hope * (offer.tokens - 1.0)) / (offer.mean_ms + self._times.draft_ms)

    def _known(self, row_id: int) -> _KnownRow:
        if row_id not in self._rows:
            self._rows[row_id] = _KnownRow(self._experience.new_row(), self._plain)
        row = self._rows[row_id]
        row.acceptance.fade(self._plain - row.plain)
        row.plain = self._plain
        return row

    @property
    def balance(self) -> float:
        """What may still be lost, in plain passes."""
        credit = self._credit if self._comparable else min(self._credit, UNMEASURED)
        return self._gained + sum(map(self._gain, self._open)) + credit + SHARE * self._passes

    def _gain(self, draft: _Draft) -> float:
        """Plain passes' time saved by a pass: by the time it took, where a given curve does not say what it takes."""
        plain = self._times.average(1, draft.batch, draft.length)
        usual = self._times.estimate(draft.nodes, draft.batch, draft.length) if draft.nodes else 0.0
        taken = min(draft.pass_ms, SPIKE * usual) if self._times.learns else usual
        return draft.tokens - (taken + draft.draft_ms) / plain

    def _explain(self, offers: dict[int, _Offer], sizes: Sequence[int]) -> str:
        size = sizes[1] if len(sizes) > 1 else RUNGS[1]
        if size not in offers:
            return "the drafter has nothing to propose"
        cost = (offers[size].mean_ms + self._times.draft_ms) / offers[1].mean_ms - 1.0
        if len(sizes) == 1:
            return f"no more may be lost in trying: {self.balance:.1f} passes are left, a draft may cost {cost:.1f}"
        accepted = offers[size].tokens - 1.0
        return f"{accepted:.2f} tokens accepted per pass of late; drafting {size} nodes costs {cost:.2f} plain passes"

    def hold(self, rows: Sequence[Row], tree: TokenTree) -> None:
        known = self._known_by(tree, self.beside)
        if known is None:
            self._wait = _FIRST_GAP
        else:
            self._held = HeldDraft(rows, tree, known)

    def _follow(self, rows: Sequence[Row], verdict: Verdict) -> None:
        """Hold a draft against what a plain pass wrote."""
        assert self._held is not None
        for row_id, columns in self._held.follow(rows, verdict.tokens).items():
            self._see(row_id, columns, self._held.known, self._held.nodes)
        if self._held.settled:
            self._held = None
            self._wait = 0 if self._pays(rows, 1) else _FIRST_GAP

    def observe(self, rows: Sequence[Row], tree: TokenTree, verdict: Verdict, ms: dict[str, float] | None) -> None:
        if self._held is not None:
            self._follow(rows, verdict)
        after_draft, self._after_draft = self._after_draft or self.beside > 1, self._asked > 1
        unnoted = self._resting and not after_draft and self._comparable and self._wait % _FIRST_GAP > 0
        if unnoted and ms is not None:  # where passes are short, so must this be; every fourth one's time is taken
            self._passes += 1
            self._plain += 1
            self._rested_ms += ms["draft"]
            return
        if ms is None:
            if self._asked > 1:
                self._learn(rows, tree, verdict)
            return
        if self._comparing and self._asked == 1:
            self._comparing -= 1
        drafting, nodes = ms["draft"], tree.computed_nodes(self._uneven)
        taken = sum(ms.values()) - drafting
        self._passes += 1
        if self._asked > 1 or not after_draft:
            self._times.observe(nodes, self._size, self._length, taken)
            self._timed_plain = self._timed_plain or self._asked == 1
        if self._asked > 1 or self.beside > 1:
            first = self._drafts == 0
            self._times.observe_draft(drafting, first)
            if first and not self._doubtful:  # it reads the prompt: later calls are to make up for it
                if self._comparable:
                    self._experience.settle(-drafting / self._times.average(1, self._size, self._length))
                drafting = 0.0
            self._drafts += 1
        if self._asked == 1:
            lost = drafting + self._rested_ms  # learning from plain passes
            self._rested_ms = 0.0
            if after_draft and self._comparable:
                self._times.observe_after_draft(self._size, self._length, taken)
                lost += self._times.delay_ms
            self._plain += 1
            if self.beside > 1:
                self._watched += lost / self._times.average(1, self._size, self._length)
            if lost:
                self._open.append(_Draft(0.0, 0, self._size, self._length, lost))
        else:
            tokens = sum(verdict.num_accepted) / len(rows) + 1.0
            self._open.append(_Draft(tokens, nodes, self._size, self._length, drafting, taken))
            self._learn(rows, tree, verdict)
        checks = self._times.learns and (self._size > 1 or not self._comparable)
        self._unchecked = self._unchecked + 1 if checks and self._asked > 1 else 0
        if self._comparable:
            gained = sum(map(self._gain, self._open))
            self._gained += gained
            self._experience.settle(gained + SHARE * (self._passes - self._settled))
            self._open, self._settled = [], self._passes

    def _learn(self, rows: Sequence[Row], tree: TokenTree, verdict: Verdict) -> None:
        known = self._known_by(tree, self._asked)
        if known is None:
            return
        for row, accepted, count in zip(rows, tree.standing_on(verdict.path), verdict.num_accepted, strict=True):
            self._see(row.row_id, accepted[1 : count + 1], known, tree.mean_nodes)
        if self._trial_over is not None:
            found = self._pays(rows, self._trial_over)
            self._gap = _FIRST_GAP if found else min(2 * self._gap, _LONGEST_GAP)
            self._wait = 0 if found and self._trial_over == 1 else self._gap

    def _known_by(self, tree: TokenTree, asked: int) -> int | None:
        """Up to which size of trees a verdict on this one tells what would have been accepted; None for nothing.

        What trees the drafter makes is noted by the way.
        """
        width = tree.computed_nodes(self._uneven)
        self._whole = self._whole or not tree.divisible
        if width == 1:
            return None  # nothing to draft, which says nothing of what is drafted elsewhere
        if tree.divisible:
            self._experience.whole_width = 0.0
        cut = tree.divisible and tree.last_standing + 1 >= asked
        if cut and self._width:
            self._width += (1 - _MEMORY) * max(width - self._width, 0.0)
            self._widest = max(self._widest, width)
        elif not cut:
            self._width += (1 - _MEMORY) * (width - self._width) if self._width else width
            self._widest = width if self._widest == RUNGS[-1] else max(self._widest, width)
        if not tree.divisible:
            self._experience.whole_width = self._widest
        if not any(drafted for drafted, _ in tree.drafts):
            return None  # only nodes that make later drafts possible
        return asked if cut else RUNGS[-1]

    def _see(self, row_id: int, columns: Sequence[int], known: int, nodes: float) -> None:
        row = self._known(row_id)
        row.acceptance.see(columns, known)
        self._experience.see(row.drafts, len(columns), nodes)
        row.drafts += 1

    def _pays(self, rows: Sequence[Row], over: int) -> bool:
        """Whether more than so many nodes pay by all that is known now."""
        offers = self._offers(rows)
        return self._best(offers, list(offers)) > over
