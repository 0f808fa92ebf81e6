"""What a peer is and what it answers: plain data, no processes and no engine imports.

A *peer* is one engine in one precision with one kind of speculation, as a user would pick it instead of specdec.
The engine itself runs in a worker process (see `process.py`), often in an environment of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "EngineSpec",
    "PeerDied",
    "PeerError",
    "PeerFailed",
    "PeerHello",
    "PeerMissing",
    "PeerReply",
    "PeerSpec",
    "PeerTimeout",
]


class PeerError(RuntimeError):
    """A peer could not do what was asked of it; the message says which peer and why."""


class PeerMissing(PeerError):
    """The peer's engine or its weights are not there; the message is one sentence that says how to get them."""


class PeerTimeout(PeerError):
    """The worker gave no answer in time and was killed."""


class PeerDied(PeerError):
    """The worker ended, or broke the protocol, before it answered; the message ends with the last lines of its log."""


class PeerFailed(PeerError):
    """The worker answered a request with an error sentence; it is still running."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine that peers are made of, and where its worker finds it.

    Attributes:
        name: the engine's name, also the name of its environment's folder.
        module: a top-level module whose presence in an interpreter means that the engine is installed there.
        title: the name to print.
    """

    name: str
    module: str
    title: str

    @property
    def worker(self) -> str:
        """File name of the engine's worker script, in the folder `workers`."""
        return f"{self.name}_worker.py"

    @property
    def install_sentence(self) -> str:
        """One sentence that tells a user how to get the engine."""
        return (
            f"{self.title} is not installed: run `python -m specdec.benchmarks.peers.install --peers-dir DIR "
            f"{self.name}` and give the same DIR to the benchmark."
        )


@dataclass(frozen=True)
class PeerSpec:
    """One peer: engine, precision and speculation, and the worker options that go with them.

    Attributes:
        name: `engine-precision` or `engine-precision-speculation`; unique in the registry.
        engine: the engine it runs on.
        precision: what the engine computes with: "fp32", "bf16", "f16", "q8_0", "q4_1", "int8" or "int4".
        speculation: "none", "lookup" (n-grams of the text so far) or "assisted" (a draft model).
        weights: the form the weights must have, as `prepare.py` makes it: "hf", "gguf-<type>" or "openvino-<type>".
        draft_len: tokens drafted ahead of each pass; 0 without speculation or where the engine chooses.
        max_ngram: longest n-gram that a lookup matches; 0 without lookup.
    """

    name: str
    engine: EngineSpec
    precision: str
    speculation: str
    weights: str
    draft_len: int = 0
    max_ngram: int = 0

    @property
    def needs_draft_model(self) -> bool:
        """Whether the peer needs a second, smaller model to draft with."""
        return self.speculation == "assisted"


@dataclass(frozen=True)
class PeerHello:
    """What a worker says once it has loaded its weights and warmed up.

    Attributes:
        version: the engine's version, as it reports it.
        load_ms: milliseconds from the worker's start to the end of its warm-up.
        notes: sentences that a reader of the numbers must know, such as a build that leaves instructions unused.
    """

    version: str
    load_ms: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeerReply:
    """One answer of a peer.

    Attributes:
        token_ids: the new tokens; an end-of-text token is included where one was generated.
        prompt_tokens: length of the prompt that the engine read.
        prefill_ms: milliseconds from the request to the first new token (time to first token).
        decode_ms: milliseconds from the first new token to the last.
        first_tokens: new tokens that came with the prefill pass; more than 1 where the engine drafts in that very pass.
        passes: passes of the target model after the prefill; None where the engine does not tell.
        drafted: tokens proposed by the speculation; None where unknown or without speculation.
        accepted: drafted tokens that were kept; None like `drafted`.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    prefill_ms: float
    decode_ms: float
    first_tokens: int = 1
    passes: int | None = None
    drafted: int | None = None
    accepted: int | None = None

    @property
    def tau(self) -> float | None:
        """Tokens emitted per target pass after the prefill (bonus tokens included); None where it is not known."""
        if not self.passes:
            return None
        return (len(self.token_ids) - self.first_tokens) / self.passes

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the prefill; None when there were none."""
        num_tokens = len(self.token_ids) - self.first_tokens
        return num_tokens * 1000.0 / self.decode_ms if num_tokens > 0 and self.decode_ms > 0 else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second up to the first new token; None when nothing was timed."""
        return self.prompt_tokens * 1000.0 / self.prefill_ms if self.prefill_ms > 0 else None

    @property
    def total_ms(self) -> float:
        """Milliseconds from the request to the last token."""
        return self.prefill_ms + self.decode_ms

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> PeerReply:
        """Check and convert a worker's reply.

        Raises:
            ValueError: a field is missing, of the wrong type or impossible; the sentence holds the field and its value.
        """
        token_ids = message.get("token_ids")
        if not isinstance(token_ids, list) or not all(_is_count(token) for token in token_ids):
            raise ValueError(f"token_ids must be a list of token ids, got {token_ids!r:.80}")
        reply = cls(
            token_ids=tuple(token_ids),
            prompt_tokens=_count(message, "prompt_tokens"),
            prefill_ms=_duration(message, "prefill_ms"),
            decode_ms=_duration(message, "decode_ms"),
            first_tokens=_count(message, "first_tokens"),
            passes=_optional_count(message, "passes"),
            drafted=_optional_count(message, "drafted"),
            accepted=_optional_count(message, "accepted"),
        )
        if reply.first_tokens > len(reply.token_ids):
            raise ValueError(f"first_tokens is {reply.first_tokens}, but only {len(reply.token_ids)} tokens came")
        return reply


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _count(message: Mapping[str, Any], field: str) -> int:
    value = message.get(field)
    if not isinstance(value, int) or not _is_count(value):
        raise ValueError(f"{field} must be a whole number of 0 or more, got {value!r:.80}")
    return value


def _optional_count(message: Mapping[str, Any], field: str) -> int | None:
    return None if message.get(field) is None else _count(message, field)


def _duration(message: Mapping[str, Any], field: str) -> float:
    value = message.get(field)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{field} must be milliseconds of 0 or more, got {value!r:.80}")
    return float(value)
