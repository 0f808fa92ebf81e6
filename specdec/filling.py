"""Prompts computed a chunk at a time, in the passes of rows that decode (SARATHI, Agrawal et al. 2023).

A pass over one token per row reads all weights to do little with them; a chunk of a prompt that rides along costs less
than in a pass of its own, and no row waits for more than a chunk of somebody else's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.batch import Row
from specdec.kv_cache import KVCache
from specdec.prefix import CommonPrefix, Stretch, longest_known
from specdec.prefix_store import PrefixStore
from specdec.segments import Shares, first_tokens
from specdec.target import PREFILL_CHUNK, Chunk, Feature, HFTarget, TargetOutput

PASS_TOKENS = 128
"""Nodes of a pass, those of decoding rows and of prompts together."""

LEAST_CHUNK = 16
"""Tokens of prompts that a pass takes however many rows decode, so that none waits for ever."""


@dataclass(eq=False)
class _Text:
    """What is being computed: a prefix that several prompts share, or a prompt.

    Attributes:
        tokens: all of it.
        parent: the longest shared prefix that it begins with; None once it has begun.
        becomes: whose prompt it is, or which shared prefix.
        cache: of one row; None before its turn.
        states: hidden states wanted of it, in parts; those of what it begins with are the first.
    """

    tokens: tuple[int, ...]
    parent: CommonPrefix | None
    becomes: Row | CommonPrefix
    cache: KVCache | None = None
    states: dict[Feature, list[Tensor]] = field(default_factory=dict)

    @property
    def row(self) -> Row | None:
        """Whose prompt it is; None of a shared prefix."""
        return self.becomes if isinstance(self.becomes, Row) else None

    @property
    def features(self) -> dict[Feature, Tensor]:
        """``[length, d]`` by name of what is computed; empty where nothing is."""
        return {name: torch.cat(parts) for name, parts in self.states.items() if parts}

    @property
    def missing(self) -> int:
        """Tokens to be computed; what is known before its turn is not counted off."""
        return len(self.tokens) - (0 if self.cache is None else self.cache.max_length)


@dataclass(frozen=True)
class FilledRow:
    """A row whose prompt is computed.

    Attributes:
        row: the row.
        cache: of one row, holds all tokens but the last.
        features: ``[length, d]`` hidden states of them, by name; none where there is no token.
    """

    row: Row
    cache: KVCache
    features: Mapping[Feature, Tensor]


def joined_features(rows: Sequence[FilledRow]) -> TargetOutput | None:
    """Hidden states ``[B, longest, d]`` of rows' prompts, padded at the end; None where none has any."""
    names = {name for each in rows for name in each.features}
    found = {name: pad_sequence([_states(name, each, rows) for each in rows], batch_first=True) for name in names}
    return TargetOutput(torch.empty(0), found) if found else None


def _states(name: Feature, filled: FilledRow, rows: Sequence[FilledRow]) -> Tensor:
    like = next(each.features[name] for each in rows if name in each.features)
    return filled.features.get(name, like[:0])


class FillingRows:
    """Rows whose prompts are being computed, first come, first served; what prompts share is computed once.

    Args:
        target: the model.
        store: prefixes computed earlier.
        features: hidden states to keep of every prompt.
    """

    def __init__(
        self,
        target: HFTarget,
        store: PrefixStore | None = None,
        features: Sequence[Feature] = (),
    ) -> None:
        self._target = target
        self._features = features
        self._store = store
        self._texts: list[_Text] = []

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order of their turns."""
        return [text.row for text in self._texts if text.row is not None]

    @property
    def shares(self) -> list[tuple[Row | None, Shares]]:
        """What the texts that have begun refer to, and whose prompts they are; None for a shared prefix."""
        return [(text.row, text.cache.shares[0]) for text in self._texts if text.cache is not None]

    def prefix_of(self, row: Row) -> CommonPrefix | None:
        """What a row here has in common with others, where its prompt has not begun."""
        return next((text.parent for text in self._texts if text.becomes is row), None)

    def add(self, rows: Sequence[Row], prefixes: Sequence[CommonPrefix | None]) -> None:
        """Take rows in; all tokens but the last are to be computed.

        Args:
            rows: the rows.
            prefixes: what each shares with others; what of it is not computed yet is computed before it.
        """
        for row, prefix in zip(rows, prefixes, strict=True):
            for each in [] if prefix is None else prefix.missing:
                if not any(text.becomes is each for text in self._texts):
                    self._texts.append(_Text(each.tokens, each.parent, each))
            self._texts.append(_Text(tuple(row.tokens[:-1]), prefix, row))

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
                found.append(Chunk(text.tokens[start : start + count], text.cache, text.states))
                budget -= count
        return found

    def _begun(self, text: _Text) -> bool:
        """Whether a text has its cache; it gets one where what it begins with is done."""
        if text.cache is None and (text.parent is None or text.parent.stretch is not None):
            origin = longest_known(text.tokens, text.parent, self._store, self._features)
            text.parent = None  # what is needed of it is referred to from now on
            text.cache = self._target.new_cache(1, max(len(text.tokens), 1))
            text.states = {name: [] for name in self._features}
            if origin is not None:
                text.cache.share(0, first_tokens(origin.shares, len(text.tokens)))
                length = text.cache.max_length  # a quantized cache may take less
                for name, parts in text.states.items():
                    parts.append(origin.features[name][:length])
        return text.cache is not None

    def take(self) -> list[FilledRow]:
        """Rows whose prompts are computed; they are gone from here."""
        found: list[FilledRow] = []
        for text in [*self._texts]:
            if not self._begun(text) or text.missing:
                break
            assert text.cache is not None
            self._texts.remove(text)
            if isinstance(text.becomes, Row):
                found.append(FilledRow(text.becomes, text.cache, text.features))
            else:
                text.becomes.finish(Stretch(text.cache.give_away()[0], text.features))
        return found

    def drop(self, row: Row) -> None:
        """Forget a row; what no other row here needs is computed no further."""
        texts = [text for text in self._texts if text.row is not row]
        prefixes = [text.parent for text in texts if text.row is not None and text.parent is not None]
        needed = {id(each) for prefix in prefixes for each in prefix.missing}
        self._texts = [text for text in texts if text.row is not None or id(text.becomes) in needed]
