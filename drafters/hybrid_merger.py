"""Trees of several drafters merged for all rows of a batch, compiled where that serves, and what is learnt by it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Protocol

from torch import Tensor

from specdec.batch import Row
from specdec.drafters.hybrid_calibration import Calibration, row_odds
from specdec.drafters.hybrid_tree import PythonTrees
from specdec.kernels.merge import CompiledTrees, new_calibration, new_row, serves


class MergedTrees(Protocol):
    """One tree per row, from the first proposal of a draft to what the target said then.

    Attributes:
        sizes: of each choice so far, the first of which is roots alone: nodes of each row.
        expected: of each choice, accepted nodes to be expected of each row.
    """

    sizes: list[list[int]]
    expected: list[list[float]]

    def add(self, part: int, tokens: Tensor, parents: Tensor, confidence: Tensor | None) -> None:
        """Merge a part's trees, no deeper than rows go, and score all nodes anew.

        Args:
            part: which one.
            tokens: ``[B, N]`` int64.
            parents: ``[B, N]`` int64 as ``TokenTree`` has them.
            confidence: ``[B, N]``, taken as float32; one that is no number counts as none. None where there is none.

        Raises:
            ValueError: where there is not one tree per row, rooted at its pending token.
        """

    def choose(
        self, max_nodes: int, least: float, most: int, worth: Callable[[Sequence[float]], int] | None = None
    ) -> None:
        """Choose the nodes most likely to be accepted, closed under ancestors.

        Args:
            max_nodes: of a row at most, root included.
            least: chance below which nodes are left out.
            most: of all rows at most, roots not counted.
            worth: told these nodes' chances, the best first, says how many of them stay; None for all.
        """

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes chosen last, each row's best first and padding at its end: tokens and parents ``[B, N]`` int64 and
        chances of acceptance ``[B, N]`` float32, on the CPU."""

    def learn(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """The target went this way from each root: all children of the nodes on it were right or wrong.

        Args:
            tokens: of each row, accepted tokens and the one that followed them.

        Returns:
            Of each choice, how many of each row's tokens it holds: what it would have had accepted, as far as is known.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in the order given."""


class Merger:
    """Merges trees of parts, and keeps what their proposals are worth: from call to call, and in each text.

    Args:
        num_parts: how many parts there are.
        compiled: whether to use compiled trees where they serve.
    """

    def __init__(self, num_parts: int, compiled: bool = True) -> None:
        self._num_parts = num_parts
        self._calibrations: dict[Hashable, Any] = {}
        self._rows: dict[int, Any] = {}
        self._new_calibration: Callable[[int], Any] = Calibration
        self._new_row: Callable[[int], Any] = row_odds
        self._new_trees: Callable[[list[int], list[int], Any, list[Any]], MergedTrees] = PythonTrees
        if compiled and serves(num_parts):
            self._new_calibration, self._new_row, self._new_trees = new_calibration, new_row, CompiledTrees

    def trees(self, way: Hashable, rows: Sequence[Row]) -> MergedTrees:
        """Trees of the rows' pending tokens.

        Args:
            way: tokens are chosen in; what proposals are worth depends on it.
            rows: of the batch.
        """
        if way not in self._calibrations:
            self._calibrations[way] = self._new_calibration(self._num_parts)
        for row in rows:
            if row.row_id not in self._rows:
                self._rows[row.row_id] = self._new_row(self._num_parts)
        pending, max_depth = [row.pending for row in rows], [row.max_depth for row in rows]
        return self._new_trees(pending, max_depth, self._calibrations[way], [self._rows[row.row_id] for row in rows])

    def keep(self, row_ids: Collection[int]) -> None:
        """Forget what was learnt in other texts than these."""
        self._rows = {row_id: odds for row_id, odds in self._rows.items() if row_id in row_ids}
