"""Prompts computed a chunk at a time, in the passes of rows that decode (SARATHI, Agrawal et al. 2023).

A pass over one token per row reads all weights to do little with them; a chunk of a prompt that rides along costs less
than in a pass of its own, and no row waits for more than a chunk of somebody else's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.batch import Row
from specdec.kv_cache import KVCache
from specdec.prefix import PrefixStore, Stretch, shared_prefixes
from specdec.segments import first_tokens
from specdec.target import PREFILL_CHUNK, Chunk, HFTarget

PASS_TOKENS = 128
"""Nodes of a pass, those of decoding rows and of prompts together."""

LEAST_CHUNK = 16
"""Tokens of prompts that a pass takes however many rows decode, so that none waits for ever."""


@dataclass(eq=False)
class _Text:
    """What is being computed: a prefix that several prompts share, or a prompt.

    Attributes:
        tokens: all of it.
        parent: the longest shared prefix that it begins with.
        row: whose prompt it is; None for a shared prefix.
        cache: of one row; None before its turn.
        stretch: a prefix that is done.
    """

    tokens: tuple[int, ...]
    parent: _Text | None = None
    row: Row | None = None
    cache: KVCache | None = None
    stretch: Stretch | None = None

    @property
    def missing(self) -> int:
        """Tokens to be computed; what is known before its turn is not counted off."""
        return len(self.tokens) - (0 if self.cache is None else self.cache.max_length)


class FillingRows:
    """Rows whose prompts are being computed, first come, first served; what prompts share is computed once.

    Args:
        target: the model.
        store: prefixes computed earlier.
        share: whether to look for what prompts of rows that come together share.
    """

    def __init__(self, target: HFTarget, store: PrefixStore | None = None, share: bool = True) -> None:
        self._target = target
        self._share = share
        self._store = store
        self._texts: list[_Text] = []

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order of their turns."""
        return [text.row for text in self._texts if text.row is not None]

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in; all tokens but the last are to be computed."""
        prompts = [tuple(row.tokens[:-1]) for row in rows]
        nodes, below = shared_prefixes(prompts) if self._share else ([], [None] * len(prompts))
        prefixes: list[_Text] = []
        for node in nodes:
            prefixes.append(_Text(node.tokens, None if node.parent is None else prefixes[node.parent]))
        self._texts += prefixes
        for row, prompt, index in zip(rows, prompts, below, strict=True):
            self._texts.append(_Text(prompt, None if index is None else prefixes[index], row))

    def chunks(self, budget: int) -> list[Chunk]:
        """What the next pass should compute: at most ``budget`` tokens, and at least one where any is missing."""
        found: list[Chunk] = []
        for text in self._texts:
            if budget < 1 or not self._begun(text):
                break
            assert text.cache is not None
            start = text.cache.max_length
            count = min(budget, text.missing, text.cache.longest_pass or PREFILL_CHUNK)
            if count:
                found.append(Chunk(text.tokens[start : start + count], text.cache))
                budget -= count
        return found

    def _begun(self, text: _Text) -> bool:
        """Whether a text has its cache; it gets one where what it begins with is done."""
        if text.cache is None and (text.parent is None or text.parent.stretch is not None):
            known = [None if text.parent is None else text.parent.stretch]
            known.append(None if self._store is None else self._store.find(text.tokens))
            origin = max((each for each in known if each is not None), key=lambda each: each.length, default=None)
            text.cache = self._target.new_cache(1, max(len(text.tokens), 1))
            if origin is not None:
                text.cache.share(0, first_tokens(origin.shares, len(text.tokens)))
        return text.cache is not None

    def take(self) -> list[tuple[Row, KVCache]]:
        """Rows whose prompts are computed, each with the cache, of one row, that holds it; they are gone from here."""
        found: list[tuple[Row, KVCache]] = []
        for text in [*self._texts]:
            if not self._begun(text) or text.missing:
                break
            assert text.cache is not None
            self._texts.remove(text)
            if text.row is not None:
                found.append((text.row, text.cache))
            else:
                text.stretch = Stretch(text.cache.give_away()[0])
        return found

    def drop(self, row: Row) -> None:
        """Forget a row; what no other row needs is computed no further."""
        texts = [text for text in self._texts if text.row is not row]
        wanted = {id(each) for text in texts if text.row is not None for each in _lineage(text)}
        self._texts = [text for text in texts if id(text) in wanted]


def _lineage(text: _Text) -> list[_Text]:
    """A text and what it begins with."""
    return [text, *([] if text.parent is None else _lineage(text.parent))]
