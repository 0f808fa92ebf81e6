"""Rows whose turn has not come, and what their prompts begin with alike, known before any of them is computed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from specdec.batch import Batch, Row
from specdec.filling import FillingRows
from specdec.prefix import CommonPrefix, SharedWork, common_prefixes, prefix_order
from specdec.segments import Shares, distinct, num_tokens


class WaitingRows:
    """Rows that wait, first come, first served; what their prompts share is found over all of them.

    A common prefix is held from the first row that begins with it to the last one: it is referred to from here until
    that one is taken, and then by whoever computes its prompt.

    Args:
        rows: those that wait from the start.
        share: whether to look for what prompts share.
        in_order: whether the rows stay in the order given; else those that share a prefix follow each other, so that
            few prefixes are held at a time.
    """

    def __init__(self, rows: Sequence[Row] = (), share: bool = True, in_order: bool = True) -> None:
        self._share = share
        self._rows = list(rows)
        self._foreseen: list[Row] = []
        self._prefixes: dict[int, CommonPrefix | None] = {}  # by row_id
        self._begun: weakref.WeakSet[CommonPrefix] = weakref.WeakSet()  # computed, or somebody's to compute
        if not in_order:
            self._plan()
            self._rows = [self._rows[index] for index in prefix_order([*self._prefixes.values()])]

    def __len__(self) -> int:
        """Rows that wait; those foreseen do not count."""
        return len(self._rows)

    @property
    def held(self) -> list[CommonPrefix]:
        """The prefixes that are computed and that somebody has still to begin with."""
        return [each for each in self._begun if each.stretch is not None]

    def append(self, row: Row) -> None:
        """Another row waits."""
        self._rows.append(row)

    def drop(self, row: Row) -> None:
        """A row waits no longer."""
        self._rows = [each for each in self._rows if each is not row]
        self._prefixes.pop(row.row_id, None)

    def foresee(self, rows: Sequence[Row]) -> None:
        """Say which rows may come to wait here later, in place of those foreseen before: prefixes are held for them."""
        self._foreseen = list(rows)
        known = {row.row_id for row in [*self._rows, *rows]}
        self._prefixes = {row_id: prefix for row_id, prefix in self._prefixes.items() if row_id in known}

    def prefix_of(self, row: Row) -> CommonPrefix | None:
        """What a row that waits or is foreseen shares with others."""
        self._plan()
        return self._prefixes.get(row.row_id)

    def take(self, count: int) -> tuple[list[Row], list[CommonPrefix | None]]:
        """The next rows, ``count`` at most, which wait no longer, and what each shares: to be computed where it is not.

        Whoever takes them holds on to the prefixes until the rows' prompts have begun.
        """
        self._plan()
        rows, self._rows = self._rows[:count], self._rows[count:]
        prefixes = {row.row_id: self._prefixes.pop(row.row_id) for row in rows}
        self._foreseen = [row for row in self._foreseen if row.row_id not in prefixes]
        self._begun.update(each for prefix in prefixes.values() if prefix is not None for each in prefix.missing)
        return rows, [*prefixes.values()]

    def _plan(self) -> None:
        """Find what prompts share, anew where rows have come."""
        rows = {row.row_id: row for row in [*self._rows, *self._foreseen]}
        if rows.keys() <= self._prefixes.keys():
            return
        prompts = [tuple(row.tokens[:-1]) for row in rows.values()]
        begun = sorted(self._begun, key=lambda each: each.tokens)
        prefixes = common_prefixes(prompts, begun) if self._share else [None] * len(rows)
        self._prefixes = dict(zip(rows, prefixes, strict=True))


def shared_work(rows: Sequence[Row], batch: Batch, filling: FillingRows, waiting: WaitingRows) -> SharedWork:
    """What rows take that come and go, between passes: what they share is there, or known.

    Args:
        rows: those that are to run at a time: of the batch, those whose prompts are being computed, and of those that
            wait or are foreseen the ones to come next. Others count for nothing but the prefixes that are held.
        batch: the rows that run.
        filling: those whose prompts are being computed.
        waiting: those that wait.
    """
    used: dict[int, Shares] = {}
    if batch.rows and batch.cache is not None:
        used = {row.row_id: shares for row, shares in zip(batch.rows, batch.cache.shares, strict=True)}
    used |= {row.row_id: shares for row, shares in filling.shares if row is not None}
    prompts = {row.row_id: tuple(row.tokens[: row.prompt_len - 1]) for row in rows}
    to_come: list[CommonPrefix] = []
    behind = []
    for row in rows:
        prompt, known = prompts[row.row_id], num_tokens(used.get(row.row_id, ()))
        prefix = None if row.row_id in used else filling.prefix_of(row) or waiting.prefix_of(row)
        if prefix is not None:
            known = prefix.length_in(prompt)
            to_come += prefix.missing
        behind.append(len(prompt) - known)
    held = [each.stretch.shares for each in waiting.held if each.stretch is not None]
    segments = distinct([*used.values(), *(shares for row, shares in filling.shares if row is None), *held])
    tokens = sum(segment.length for segment in segments)
    for each in dict.fromkeys(to_come):
        tokens += len(each.tokens) - (0 if each.parent is None else each.parent.length_in(each.tokens))
    longest = max(map(len, prompts.values()))
    return SharedWork(max(behind), ((1, tokens, longest), (len(rows), max(behind), longest)))
