"""Prompt lookup: what followed the last few tokens before, in prompt and output, is proposed again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.target import TargetOutput
from specdec.tree import TokenTree, TreeBuilder


@dataclass(frozen=True)
class NgramConfig:
    """Options of the n-gram drafter.

    Attributes:
        max_ngram: longest suffix looked up.
        min_ngram: shortest suffix looked up.
        max_matches: continuations merged into the tree, longest match first, most recent first.
        depth: tokens proposed per continuation.
        max_nodes: most nodes of a tree, root included.
    """

    max_ngram: int = 4
    min_ngram: int = 1
    max_matches: int = 4
    depth: int = 8
    max_nodes: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"need 1 <= min_ngram <= max_ngram, got {self.min_ngram} and {self.max_ngram}")
        for name in ("max_matches", "depth", "max_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class _NgramIndex:
    """Where each n-gram of one row ended, most recent last."""

    def __init__(self, config: NgramConfig) -> None:
        self._lengths = range(config.max_ngram, config.min_ngram - 1, -1)
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._indexed = 0

    def update(self, tokens: Sequence[int]) -> None:
        """Index n-grams that a token follows; the one at the very end waits for its continuation."""
        for end in range(self._indexed + 1, len(tokens)):
            for length in self._lengths:
                if length <= end:
                    self._ends[tuple(tokens[end - length : end])].append(end)
        self._indexed = max(self._indexed, len(tokens) - 1)

    def matches(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Starts of continuations of the row's suffix, best first, each at most once."""
        found: dict[int, None] = {}
        for length in self._lengths:
            if length < len(tokens):
                for end in reversed(self._ends.get(tuple(tokens[-length:]), ())):
                    found.setdefault(end)
                    if len(found) == limit:
                        return list(found)
        return list(found)


class NgramDrafter(Drafter):
    """Prompt lookup (Saxena 2023) with several matches merged into one tree."""

    name = "ngram"
    Config = NgramConfig

    def __init__(self, config: NgramConfig | None = None) -> None:
        self.config = config or NgramConfig()
        self._indices: dict[int, _NgramIndex] = {}

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._indices = {row.row_id: _NgramIndex(self.config) for row in batch.rows}

    def propose(self, batch: Batch) -> TokenTree:
        builders = []
        for row in batch.rows:
            index = self._indices[row.row_id]
            index.update(row.tokens)
            builder = TreeBuilder(row.pending, self.config.max_nodes)
            depth = min(self.config.depth, row.max_depth)
            for start in index.matches(row.tokens, self.config.max_matches):
                builder.add_path(row.tokens[start : start + depth])
            builders.append(builder)
        return TokenTree.from_rows(builders, batch.device)

    def stop(self) -> None:
        self._indices = {}
