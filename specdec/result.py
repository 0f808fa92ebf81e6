"""What a generation returns, whole or as it comes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from specdec.batch import FinishReason, Row
from specdec.stats import DecodeStats


@dataclass(frozen=True)
class GenerationResult:
    """One completion.

    Attributes:
        text: the new text, cut before a stop string; "" without a tokenizer.
        token_ids: all emitted tokens, the one that ended the text included.
        finish_reason: why it ended.
        stats: counts and times of this completion.
        logprobs: per emitted token its log-probability under the target at temperature 1, unfiltered; None unless
            asked for.
        prompt_len: prompt tokens.
        prompt_index: which prompt of the call this completes.
        completion_index: which of the prompt's n completions this is.
        error: what went wrong, where ``finish_reason`` is "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: DecodeStats
    logprobs: list[float] | None = None
    prompt_len: int = 0
    prompt_index: int = 0
    completion_index: int = 0
    error: str | None = None

    @classmethod
    def of(cls, row: Row) -> GenerationResult:
        """The result of a row, ended or not."""
        return cls(
            text="" if row.text is None else row.text.text,
            token_ids=row.emitted,
            finish_reason=row.finish_reason or "cancelled",
            stats=row.stats,
            logprobs=row.logprobs if row.params.logprobs else None,
            prompt_len=row.prompt_len,
            prompt_index=row.prompt_index,
            completion_index=row.completion_index,
            error=row.error,
        )


@dataclass(frozen=True)
class StreamPiece:
    """One emitted token as it comes; ``str(piece)`` is its text.

    Attributes:
        text: text that became certain with this token, often its own, "" while characters or stop strings are open.
        token_id: the token; None for held-back text released because the target failed.
        from_draft: whether it was drafted and accepted, not chosen by the target as a bonus.
        index: row of the call, prompt-major.
    """

    text: str
    token_id: int | None
    from_draft: bool
    index: int

    def __str__(self) -> str:
        return self.text


class GenerationStream(Iterator[StreamPiece]):
    """Iterates over pieces as they come; ``results`` holds what there is so far at any time.

    Closing it, leaving a ``with`` block or dropping it ends the generation; the decoder stays usable.
    """

    def __init__(self, pieces: Generator[StreamPiece, None, None], rows: list[Row], stats: DecodeStats) -> None:
        self._pieces = pieces
        self._rows = rows
        self.stats = stats

    def __next__(self) -> StreamPiece:
        return next(self._pieces)

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation; rows still running finish as "cancelled"."""
        self._pieces.close()

    @property
    def results(self) -> list[GenerationResult]:
        """Results of all rows, in order."""
        return [GenerationResult.of(row) for row in self._rows]

    @property
    def result(self) -> GenerationResult:
        """The first row's result."""
        return self.results[0]
