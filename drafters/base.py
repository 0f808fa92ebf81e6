"""The interface every drafter implements. Nothing outside a drafter's own module knows how it works."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from specdec.batch import Batch
from specdec.target import Feature, HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

if TYPE_CHECKING:
    from specdec.drafters.weights import TargetFacts


class Drafter(ABC):
    """Proposes a token tree per step and may learn from what the target made of it.

    A drafter never influences the text, only how soon it is there. Calls come in the order ``bind`` (once), then per
    generation ``prepare``, ``start``, any number of ``propose`` / ``observe`` / ``keep`` / ``join``, and ``stop``.

    Attributes:
        name: as given to ``SpecDecoder(drafter=...)``.
        Config: frozen dataclass of options; the constructor takes one instance of it, or none for the defaults.
        features: hidden states of the target the drafter wants in ``start`` and ``observe``.
        reads_logits: whether ``observe`` reads the target's logits; if not, passes kept for later lack them.
        virtual_nodes: whether its trees hold virtual nodes, which cannot be merged with another drafter's.
        takes_rows: of a drafter with ``features``, whether ``join`` takes those of rows that join; if not, new rows
            wait until all others have ended.
        in_step: whether it shares its work with other processes, all of which have to draft for the same trees.
        parts: the drafters it is made of, if any.
    """

    name: str
    Config: ClassVar[type[Any]]
    features: Sequence[Feature] = ()
    reads_logits: bool = True
    virtual_nodes: ClassVar[bool] = False
    takes_rows: bool = False
    in_step: bool = False
    parts: Sequence[Drafter] = ()

    @property
    def observes(self) -> bool:
        """Whether ``observe`` is its own; passes are kept for no other drafter."""
        return type(self).observe is not Drafter.observe

    def weights_folder(self, target: TargetFacts) -> Path | None:
        """Where the weights lie that ``bind`` reads for such a target; None where it reads none.

        Raises ValueError where none are found.
        """
        return None

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        """Meet the target; allocate what depends on it. Raises ValueError where the two do not fit."""

    def prepare(self, by_clock: bool) -> None:
        """A generation begins: which ``features`` it reads may change here, and nowhere else.

        Args:
            by_clock: whether drafts may depend on how long things took; not where a seed asks again for a text that
                depends on the trees.
        """

    @property
    def every_feature(self) -> Sequence[Feature]:
        """All that ``features`` may ever be."""
        return self.features

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        """A generation begins.

        One that reads hidden states but no logits is told so when it is first asked for a draft, which in a short text
        may be never, with the rows as they were after the prefill. What was decoded meanwhile it is shown next.

        Args:
            batch: its rows; every token but the last is in the target's cache.
            output: features of the prompt tokens prefilled, None where there was nothing to prefill.
        """

    @abstractmethod
    def propose(self, batch: Batch) -> TokenTree:
        """A tree per row, rooted at ``batch.pending``, on any device.

        Nodes deeper than ``batch.max_depth`` and columns from ``batch.max_nodes`` on are cut by the caller, and then
        what rows have beyond ``batch.mean_nodes`` on average, the nodes of least ``confidence`` first, or the last
        columns of each row where there is none; drafting fewer saves time. So the most promising nodes should stand
        first. Children of a node must be chosen as ``batch.siblings`` says, or deterministically. Only where
        ``batch.coupled`` is set may the choice depend on the rows' Gumbel noise.

        It is not called before every pass: where drafts do not pay, tokens are decoded without them.
        """

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        """See the pass: the target's logits and features at the tree's nodes, and the verdict.

        Called before the accepted tokens are appended to the rows. Of a drafter's own tree, of roots, or of trees that
        others drafted: what was accepted stands in the columns of ``verdict.path``, and what stands elsewhere may be
        anything. Several passes that it was not asked about are shown later, at the latest before the next ``propose``,
        as one chain that was accepted; the rows hold their tokens by then. So are those after a draft for
        ``batch.unchecked``, which no pass is run over.
        """

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        """Rows ended: only these go on, in this order. ``batch`` still holds all of them, new tokens included."""

    def join(self, batch: Batch, count: int, output: TargetOutput | None = None) -> None:
        """Rows joined at the batch's end, ``count`` of them; all their tokens but the last are in the target's cache.

        Args:
            batch: all rows.
            count: how many are new.
            output: features ``[count, longest, d]`` of the new rows' prompts, as ``start`` takes them. Given where the
                drafter has ``features``; it is not asked then unless it has ``takes_rows``.
        """
        self.stop()
        self.start(batch, None)

    def expected_accepted(self, sizes: Sequence[int]) -> list[float] | None:
        """Accepted nodes per pass to expect of trees of these sizes, by calibration; None where there was none."""
        return None

    def survivor(self) -> Drafter | None:
        """What goes on with the call after one of these methods raised; None is plain decoding."""
        return None

    def stop(self) -> None:
        """The generation is over, or was abandoned; drop its state."""
