"""What a generation leaves for a later one to build on: its tokens and their cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.batch import Row
from specdec.kv_cache import KVCache
from specdec.prefix import common_prefix


@dataclass
class KeptPrefix:
    """Tokens of an earlier generation and the one-row cache that holds them, for a later one to build on."""

    tokens: list[int] = field(default_factory=list)
    cache: KVCache | None = None

    def take(self, prompt: Sequence[int]) -> KVCache | None:
        """The cache, cut to what a prompt begins with; None where there is none.

        It is the caller's until ``leave``: a failure must not leave it stale.
        """
        cache, reused = self.cache, common_prefix(self.tokens, prompt)
        self.tokens, self.cache = [], None
        if cache is not None:
            cache.truncate([reused])
        return cache

    def leave(self, row: Row, cache: KVCache) -> None:
        """Keep the cache, cut to the text of its row; nothing of a row that failed."""
        if row.error is None:
            cache.truncate([min(cache.max_length, len(row.tokens))])
            self.tokens, self.cache = row.tokens[: cache.max_length], cache
