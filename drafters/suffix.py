"""Suffix decoding: the longest suffix seen before, in this text or an earlier one, with counts of what followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.kernels.suffix import Asked, make_corpus
from specdec.target import TargetOutput
from specdec.tree import TokenTree


@dataclass(frozen=True)
class SuffixConfig:
    """Options of the suffix drafter.

    Attributes:
        max_nodes: most nodes of a tree, root included.
        depth: deepest node.
        nodes_per_match: nodes proposed per matched token: a longer match is trusted further.
        min_probability: nodes with a lower estimated chance of acceptance are left out.
        corpus_tokens: earlier generations remembered, in tokens; 0 remembers none.
    """

    max_nodes: int = 16
    depth: int = 12
    nodes_per_match: float = 4.0
    min_probability: float = 0.05
    corpus_tokens: int = 200_000

    def __post_init__(self) -> None:
        for name, low in (("max_nodes", 1), ("depth", 1), ("nodes_per_match", 0.1), ("corpus_tokens", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0.0 <= self.min_probability <= 1.0:
            raise ValueError(f"min_probability must be in [0, 1], got {self.min_probability}")


@dataclass
class _Reading:
    """A row's text as the corpus knows it, and how many of its tokens were read."""

    text: Any
    read: int = 0


class SuffixDrafter(Drafter):
    """SuffixDecoding (Oliaro et al. 2024) on suffix automata: one per row and one over finished generations."""

    name = "suffix"
    Config = SuffixConfig

    def __init__(self, config: SuffixConfig | None = None) -> None:
        self.config = config or SuffixConfig()
        self._rows: dict[int, _Reading] = {}
        self._corpus = make_corpus(
            self.config.max_nodes, self.config.nodes_per_match, self.config.min_probability, self.config.corpus_tokens
        )

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._rows = {row.row_id: _Reading(self._corpus.begin()) for row in batch.rows}

    def propose(self, batch: Batch) -> TokenTree:
        asked: list[Asked] = []
        for row in batch.rows:
            reading = self._rows[row.row_id]
            asked.append((reading.text, row.tokens[reading.read :], min(self.config.depth, row.max_depth)))
            reading.read = len(row.tokens)
        return self._corpus.draft(asked).to(batch.device)

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        for index in set(range(len(batch))) - set(rows):
            row = batch.rows[index]
            del self._rows[row.row_id]
            self._corpus.remember(row.tokens)

    def stop(self) -> None:
        self._rows = {}
