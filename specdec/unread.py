"""Prompts a drafter has not read: one that reads hidden states does so when it is first asked, which may be never."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.target import TargetOutput


def reads_late(drafter: Drafter) -> bool:
    """Whether a drafter is shown nothing before it is asked, as reading many states takes little more than one.

    A hybrid is shown everything: it sees to that for each of its parts.
    """
    return bool(drafter.features) and not drafter.reads_logits and not drafter.parts


class UnreadPrompt:
    """What a drafter begins with once it is asked: its rows as they were, and their prompts' hidden states."""

    def __init__(self) -> None:
        self._waiting: tuple[Batch, TargetOutput] | None = None

    @property
    def num_states(self) -> int:
        """Hidden states that wait, those of all rows."""
        return 0 if self._waiting is None else sum(len(row.tokens) - 1 for row in self._waiting[0].rows)

    def start(self, drafter: Drafter, batch: Batch, output: TargetOutput | None) -> None:
        """Have a drafter begin, at once or, where it reads late, when it is first asked.

        Args:
            output: of the prompts, features ``[B, N, d]``; None where no states were computed.
        """
        self._waiting = None
        if output is not None and reads_late(drafter):
            states = {name: output.features[name] for name in drafter.features}
            self._waiting = batch.as_it_is(), TargetOutput(output.logits, states)
        else:
            drafter.start(batch, output)

    def begun(self, drafter: Drafter) -> Drafter:
        """The drafter, which has now read the prompt."""
        if self._waiting is not None:
            (batch, output), self._waiting = self._waiting, None
            drafter.start(batch, output)
        return drafter

    def keep(self, drafter: Drafter, batch: Batch, rows: Sequence[int]) -> None:
        """Drop all rows but these, in the order given, of what waits, or else of the drafter."""
        if self._waiting is None:
            drafter.keep(batch, rows)
            return
        waiting, output = self._waiting
        waiting.keep(rows)
        states = {name: value[rows] for name, value in output.features.items()}
        self._waiting = (waiting, TargetOutput(output.logits, states)) if rows else None
