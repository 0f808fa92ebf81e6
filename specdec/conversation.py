"""A chat of several turns that computes nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from specdec.decoder import SpecDecoder
from specdec.kept_prefix import KeptPrefix
from specdec.result import GenerationResult, GenerationStream, StreamPiece
from specdec.sampling import SamplingParams
from specdec.stats import DecodeStats


class ConversationStream(Iterator[StreamPiece]):
    """One answer as it comes; like ``GenerationStream``, and the conversation gets the text when it ends.

    Args:
        stream: the generation.
        on_end: called once, with the text so far.
    """

    def __init__(self, stream: GenerationStream, on_end: Callable[[str], None]) -> None:
        self._stream = stream
        self._on_end: Callable[[str], None] | None = on_end

    def __next__(self) -> StreamPiece:
        try:
            return next(self._stream)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> ConversationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the answer; what there is of it stays in the conversation."""
        self._stream.close()
        self._end()

    def _end(self) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self._stream.result.text)

    @property
    def stats(self) -> DecodeStats:
        """Counts and times of this answer."""
        return self._stream.stats

    @property
    def result(self) -> GenerationResult:
        """What there is of the answer."""
        return self._stream.result


class Conversation:
    """Turns of a chat over one cache: a turn prefills only what the turns before it did not.

    Args:
        decoder: its tokenizer must have a chat template.
        system: a system message to begin with.

    Raises:
        ValueError: when the tokenizer has no chat template.
    """

    def __init__(self, decoder: SpecDecoder, system: str | None = None) -> None:
        if not getattr(decoder.tokenizer, "chat_template", None):
            raise ValueError("this model's tokenizer has no chat template: use generate() with text instead")
        self.decoder = decoder
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._kept = KeptPrefix()
        self._answer: ConversationStream | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._close_answer()
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def send(self, text: str, params: SamplingParams | None = None, **fields: Any) -> ConversationStream:
        """The user's next message; the answer comes as the stream is read.

        An earlier answer still open is closed first. ``messages`` gets the answer's text when it ends or is closed.

        Raises:
            ValueError: for an empty text or parameters that cannot be served; the conversation is then unchanged.
        """
        self._close_answer()
        if not text.strip():
            raise ValueError("the message is empty: give some text")
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self.decoder.stream(messages, params, kept=self._kept, **fields)
        self.messages = messages
        self._answer = ConversationStream(stream, self._take)
        return self._answer

    def _close_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()

    def _take(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})
        self._answer = None
