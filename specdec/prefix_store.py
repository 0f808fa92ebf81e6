"""Prefixes kept across calls, the least recently used going first where memory runs out.

Whoever calls names them, or the store finds them: what a prompt and an earlier one begin with alike - a system prompt,
examples, the conversation so far - is likely to come again, and is there already once the prompt is computed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.memory import size_text
from specdec.prefix import Stretch, common_prefix, extend_from
from specdec.segments import distinct, first_tokens
from specdec.target import Feature, HFTarget

_RECENT = 8
"""Prompts that later ones are compared with."""

LEAST_NOTICED = 16
"""Tokens beyond those kept already that prompts must have in common."""

_NOTICED_SHARE = 4
"""What is kept without being asked for takes at most this part of the budget, each."""


@dataclass
class KeptText:
    """A prefix in the store."""

    tokens: tuple[int, ...]
    stretch: Stretch
    pinned: int = 0

    @property
    def feature_bytes(self) -> int:
        """Bytes of hidden states drafters read."""
        return sum(states.nbytes for states in self.stretch.features.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of its keys and values, shared ones included, and of hidden states drafters read."""
        return sum(part.num_bytes for part in distinct([self.stretch.shares])) + self.feature_bytes


class PrefixStore:
    """Prefixes kept across calls; the least recently used go first where memory runs out.

    A server's passes look prefixes up in a thread of their own while clients ask what is kept and evict, so what is
    kept is read and changed under a lock. Nothing is computed under it: who asks waits for no pass.

    Args:
        target: whose keys and values they are.
        budget: bytes for all of them.
        bytes_per_token: what a token takes, to refuse a prefix before it is computed.
        notices: whether to keep, as far as there is room, what successive prompts begin with alike.
    """

    def __init__(self, target: HFTarget, budget: int, bytes_per_token: int, notices: bool = False) -> None:
        self.target = target
        self.budget = budget
        self._bytes_per_token = bytes_per_token
        self._lock = threading.RLock()
        self._kept: OrderedDict[tuple[int, ...], KeptText] = OrderedDict()  # least recently used first
        self._notices = notices
        self.limit: int | None = None
        """Bytes up to which prefixes are kept unasked; None for what is always the limit."""
        self._recent: deque[tuple[int, ...]] = deque(maxlen=_RECENT)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return tuple(tokens) in self._kept

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept; what several prefixes begin with counts once."""
        with self._lock:
            return _bytes_of([*self._kept.values()])

    @property
    def pinned_bytes(self) -> int:
        """The same of what is in use, which stays whatever happens."""
        with self._lock:
            return _bytes_of([kept for kept in self._kept.values() if kept.pinned])

    @contextmanager
    def hold(self, tokens: Sequence[int], features: Sequence[Feature] = ()) -> Iterator[KeptText]:
        """Have a prefix computed and keep it for sure within the block, and afterwards while there is room.

        Args:
            tokens: the prefix.
            features: hidden states a drafter will want of it.

        Raises:
            ValueError: when it is larger than all that may be kept, or what is in use leaves no room for it.
        """
        key = tuple(tokens)
        kept = self._take(key, features)
        try:
            yield kept
        finally:
            with self._lock:
                self._kept[key].pinned -= 1  # another block may have had it computed anew, with more hidden states

    def notice(self, prompts: Sequence[tuple[int, ...]], cache: KVCache, features: Mapping[Feature, Tensor]) -> None:
        """Prompts were computed: keep what one of them and an earlier one begin with alike.

        Args:
            prompts: token ids, a row of the cache each.
            cache: holds them; what is kept is copied.
            features: ``[B, longest, d]`` hidden states of them, by name.
        """
        if not self._notices:
            return
        for row, tokens in enumerate(prompts):
            count = max((common_prefix(tokens, each) for each in self._recent), default=0)
            known = self.find(tokens[:count], [*features])
            if count - (0 if known is None else known.length) < LEAST_NOTICED:
                continue
            size = count * (self._bytes_per_token + sum(value[row, 0].nbytes for value in features.values()))
            room = self.budget if self.limit is None else self.limit - self.num_bytes
            if size <= min(self.budget // _NOTICED_SHARE, room):
                states = {name: value[row, :count].clone() for name, value in features.items()}
                with suppress(ValueError):  # what is in use leaves no room
                    self._put(KeptText(tokens[:count], Stretch(cache.beginning(row, count), states)))
        self._recent.extend([*dict.fromkeys(prompts)][-_RECENT:])

    def _put(self, found: KeptText) -> None:
        """Keep a text, or raise ValueError where what is in use leaves no room."""
        with self._lock:
            before = self._kept.get(found.tokens)
            found.pinned = 0 if before is None else before.pinned
            self._kept[found.tokens] = found
            self._kept.move_to_end(found.tokens)
            try:
                self._make_room(0, found.tokens)
            except ValueError:
                if not found.pinned:
                    del self._kept[found.tokens]
                raise

    def evict(self, tokens: Sequence[int]) -> None:
        """Forget a prefix. Raises ValueError where it is not kept, or in use."""
        key = tuple(tokens)
        with self._lock:
            if key not in self._kept:
                raise ValueError(f"no prefix of these {len(key)} tokens is kept")
            if self._kept[key].pinned:
                raise ValueError(f"the prefix of {len(key)} tokens is in use: leave its with-block first")
            del self._kept[key]

    def clear(self) -> None:
        """Forget all that is not in use."""
        with self._lock:
            for key in [key for key, kept in self._kept.items() if not kept.pinned]:
                del self._kept[key]

    def find(self, tokens: Sequence[int], features: Sequence[Feature] = ()) -> Stretch | None:
        """The longest beginning of a text that is kept, with the hidden states asked for; None where there is none."""
        best, length = None, 0
        with self._lock:
            for kept in self._kept.values():
                shared = common_prefix(kept.tokens, tokens)
                if shared > length and set(features) <= set(kept.stretch.features):
                    best, length = kept, shared
            if best is None:
                return None
            self._kept.move_to_end(best.tokens)
        return Stretch(first_tokens(best.stretch.shares, length), best.stretch.features)

    def _take(self, tokens: tuple[int, ...], features: Sequence[Feature]) -> KeptText:
        """The prefix, computed where it is missing, and in use once more."""
        with self._lock:
            known = self._kept.get(tokens)
            if known is not None and set(features) <= set(known.stretch.features):
                self._kept.move_to_end(tokens)
                known.pinned += 1
                return known
            needed = len(tokens) * self._bytes_per_token
            if needed > self.budget:
                raise ValueError(
                    f"a prefix of {len(tokens)} tokens takes {size_text(needed)}, prefixes may take "
                    f"{size_text(self.budget)}: raise prefix_memory or shorten it"
                )
            self._make_room(needed, tokens)
        cache, output = extend_from(self.target, [tokens], [self.find(tokens, features)], len(tokens), features)
        states = {} if output is None else {name: value[0].clone() for name, value in output.features.items()}
        kept = KeptText(tokens, Stretch(cache.give_away()[0], states))
        with self._lock:
            self._put(kept)  # hidden states were not foreseen
            kept.pinned += 1
        return kept

    def _make_room(self, needed: int, tokens: tuple[int, ...]) -> None:
        """Evict all but ``tokens`` until ``needed`` more bytes fit; none where they never would. The lock is held."""
        least = _bytes_of([kept for key, kept in self._kept.items() if kept.pinned or key == tokens]) + needed
        if least > self.budget:
            raise ValueError(
                f"the prefixes in use and this one of {len(tokens)} tokens take {size_text(least)}, "
                f"{size_text(self.budget)} is the limit: leave a with-block, or raise prefix_memory"
            )
        for key in [key for key, kept in self._kept.items() if not kept.pinned and key != tokens]:
            if self.num_bytes + needed <= self.budget:
                return
            del self._kept[key]


def _bytes_of(texts: Sequence[KeptText]) -> int:
    segments = distinct(kept.stretch.shares for kept in texts)
    return sum(part.num_bytes for part in segments) + sum(kept.feature_bytes for kept in texts)
