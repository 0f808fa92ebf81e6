"""Text from tokens as they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast


class TextStream:
    """Decodes a growing list of tokens piece by piece.

    A piece is held back while it ends in an incomplete character, or while it may still become a stop string.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that end the text; the text is cut before the first one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._decode = decoder_of(tokenizer)
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context_start = 0  # tokens before it no longer influence how later ones decode
        self._decoded_until = 0
        self._decoded = ""
        self._taken = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, cut before a stop string; an incomplete last character is left out until ``finish``."""
        return self._decoded

    def push(self, token: int) -> bool:
        """Add a token; True when it completes a stop string."""
        self._ids.append(token)
        context = self._decode(self._ids[self._context_start : self._decoded_until])
        whole = self._decode(self._ids[self._context_start :])
        if len(whole) > len(context) and not whole.endswith("\ufffd"):
            self._append(whole[len(context) :])
            self._context_start, self._decoded_until = self._decoded_until, len(self._ids)
        return self.stopped

    def _append(self, piece: str) -> None:
        start = max(0, len(self._decoded) - max((len(stop) for stop in self._stop), default=0))
        self._decoded += piece
        found = [at for stop in self._stop if (at := self._decoded.find(stop, start)) >= 0]
        if found:
            self._decoded = self._decoded[: min(found)]
            self.stopped = True

    def take(self, final: bool = False) -> str:
        """Text that is certain and was not taken before; with ``final`` all that is left."""
        end = len(self._decoded)
        if not final and not self.stopped:
            end -= max((self._partial_stop(stop) for stop in self._stop), default=0)
        piece = self._decoded[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _partial_stop(self, stop: str) -> int:
        """Length of the longest proper prefix of ``stop`` the text ends with."""
        for length in range(min(len(stop) - 1, len(self._decoded)), 0, -1):
            if self._decoded.endswith(stop[:length]):
                return length
        return 0

    def finish(self) -> None:
        """Decode what was held back as an incomplete character."""
        if not self.stopped and self._decoded_until < len(self._ids):
            context = self._decode(self._ids[self._context_start : self._decoded_until])
            self._append(self._decode(self._ids[self._context_start :])[len(context) :])
            self._decoded_until = len(self._ids)


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """What turns ids into text without special tokens: the library below the tokenizer where that does all of it."""
    kind = type(tokenizer)
    direct = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
        and not tokenizer.clean_up_tokenization_spaces
    )
    decode = tokenizer.backend_tokenizer.decode if direct else tokenizer.decode

    def text_of(ids: list[int]) -> str:
        text: str = decode(ids, skip_special_tokens=True)
        return text

    return text_of
