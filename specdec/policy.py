"""Who says how large the next trees may be: what the loop asks of it, and the simplest one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec.batch import Row
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

NO_LIMIT = 1 << 30
"""A budget no tree reaches."""


class TreePolicy(Protocol):
    """Says how large trees may be. The loop asks before each pass and tells afterwards.

    Attributes:
        reason: why the last budget was 1; None where it was not.
        beside: nodes per row to draft although the last budget was 1, for ``hold``; 1 for none.
    """

    reason: str | None
    beside: int

    @property
    def trying(self) -> bool:
        """Whether the last budget is a trial, to see whether drafts would pay after all."""

    def budget(self, rows: Sequence[Row], most: int = NO_LIMIT) -> int:
        """Nodes per row of the next pass on average, roots included; 1 is plain decoding: no drafter is asked.

        ``most`` is what a single row may have.
        """

    def hold(self, rows: Sequence[Row], tree: TokenTree) -> None:
        """``tree`` was drafted beside the plain pass that comes now, to be held against the tokens that follow."""

    def observe(self, rows: Sequence[Row], tree: TokenTree, verdict: Verdict, ms: dict[str, float] | None) -> None:
        """A pass was run over ``tree`` for the rows last asked about.

        ``ms`` is all of the step, by phase; None where prompts of other rows rode along, so that it says nothing.
        """


class FixedTrees:
    """Trees as the drafter makes them."""

    reason: str | None = None
    beside = 1

    @property
    def trying(self) -> bool:
        return False

    def budget(self, rows: Sequence[Row], most: int = NO_LIMIT) -> int:
        return most

    def hold(self, rows: Sequence[Row], tree: TokenTree) -> None:
        pass

    def observe(self, rows: Sequence[Row], tree: TokenTree, verdict: Verdict, ms: dict[str, float] | None) -> None:
        pass
