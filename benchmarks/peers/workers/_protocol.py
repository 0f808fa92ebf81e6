"""The worker's half of the peer protocol: JSON lines, one request in, one reply out. Standard library only.

Lines that the worker reads:  {"id", "prompt_ids", "max_new_tokens", "greedy", "ignore_eos", "eos_ids"}
Lines that the worker writes: {"ready": true, "version", "load_ms", "notes"} once, then for each request
                              {"id", "token_ids", "prompt_tokens", "prefill_ms", "decode_ms", "first_tokens", "passes",
                              "drafted", "accepted"} or {"id", "error"}.
A failure to load is {"error"} in place of the ready line. The end of the input ends the worker, even one that is busy:
so it does not outlive a parent that was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TextIO

EXIT_GRACE_S = 1.0
WARM_UP_PROMPT_LEN = 32
WARM_UP_NEW_TOKENS = 16


@dataclass(frozen=True)
class Options:
    """How the engine is to be loaded; see `PeerSpec` for the words that precision and speculation can be."""

    weights: str
    threads: int
    precision: str
    speculation: str
    draft_len: int
    max_ngram: int
    draft_model: str
    max_context: int


@dataclass(frozen=True)
class Request:
    """One prompt of already templated token ids, to be continued greedily."""

    prompt_ids: list[int]
    max_new_tokens: int
    eos_ids: list[int]

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Request:
        """Raises ValueError for a request that no worker can serve."""
        if not message.get("greedy", True):
            raise ValueError("peers decode greedily, but the request says greedy: false")
        if not message["prompt_ids"]:
            raise ValueError("the prompt is empty")
        if message["max_new_tokens"] < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {message['max_new_tokens']}")
        eos_ids = [] if message.get("ignore_eos", False) else list(message["eos_ids"])
        return cls(list(message["prompt_ids"]), message["max_new_tokens"], eos_ids)


@dataclass
class Reply:
    """What came of a request; the fields are those of `PeerReply` in specdec."""

    token_ids: list[int]
    prefill_ms: float
    decode_ms: float
    first_tokens: int = 1
    passes: int | None = None
    drafted: int | None = None
    accepted: int | None = None


@dataclass
class Clock:
    """Arrival times of tokens, from which a reply's timings follow. Times are `time.perf_counter` seconds."""

    start: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    num_first: int = 0
    num_arrivals: int = 0

    def arrived(self, num_tokens: int) -> None:
        """Note that one pass has just brought `num_tokens` new tokens."""
        self.last = time.perf_counter()
        self.num_arrivals += 1
        if self.num_arrivals == 1:
            self.first, self.num_first = self.last, num_tokens

    def reply(self, token_ids: list[int], drafted: int | None = None, accepted: int | None = None) -> Reply:
        """The reply for `token_ids`, once every pass that brought them was noted."""
        if not self.num_arrivals:
            raise RuntimeError("the engine returned no token")
        return Reply(
            token_ids=token_ids,
            prefill_ms=(self.first - self.start) * 1e3,
            decode_ms=(self.last - self.first) * 1e3,
            first_tokens=min(self.num_first, len(token_ids)),
            passes=self.num_arrivals - 1,
            drafted=drafted,
            accepted=accepted,
        )


class Engine(Protocol):
    """A loaded engine."""

    version: str
    notes: list[str]

    def generate(self, request: Request) -> Reply:
        """Continue one prompt; blocking. Token ids end with the end-of-text token where one was generated."""


def cut_at_eos(token_ids: list[int], request: Request) -> list[int]:
    """`token_ids` up to `max_new_tokens` and up to the first end-of-text token, which stays in."""
    token_ids = token_ids[: request.max_new_tokens]
    ends = [token_ids.index(eos) for eos in request.eos_ids if eos in token_ids]
    return token_ids[: min(ends) + 1] if ends else token_ids


def claim_channel() -> tuple[TextIO, TextIO]:
    """Take standard input and output for the protocol alone, and return them as (requests, replies).

    What the process prints from now on, native libraries and child processes included, goes to standard error; what it
    reads is empty. Call it before importing an engine.
    """
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return requests, replies


def parse_options(arguments: list[str] | None = None) -> Options:
    """Options from the command line that `PeerProcess.launch` writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--speculation", choices=["none", "lookup", "assisted"], default="none")
    parser.add_argument("--draft-len", type=int, default=0)
    parser.add_argument("--max-ngram", type=int, default=0)
    parser.add_argument("--draft-model", default="")
    parser.add_argument("--max-context", type=int, default=4096)
    return Options(**vars(parser.parse_args(arguments)))


def serve(load: Callable[[Options], Engine]) -> None:
    """Run a worker: claim the channel, load the engine, warm it up, then answer requests until the input ends."""
    start = time.perf_counter()
    requests, replies = claim_channel()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(requests, lines), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    options = parse_options()
    try:
        engine = load(options)
        warm_up = Request(list(range(3, 3 + WARM_UP_PROMPT_LEN)), WARM_UP_NEW_TOKENS, [])
        engine.generate(warm_up)
    except Exception as error:
        traceback.print_exc()
        send({"error": _sentence(error)})
        sys.exit(1)
    load_ms = (time.perf_counter() - start) * 1e3
    send({"ready": True, "version": engine.version, "load_ms": load_ms, "notes": engine.notes})
    while line := lines.get():
        send(_answer(engine, line))


def _read_lines(requests: TextIO, lines: queue.SimpleQueue[str]) -> None:
    """Hand on each line of the input and "" at its end; a worker that is still there a while after that is ended."""
    for line in requests:
        lines.put(line)
    lines.put("")
    time.sleep(EXIT_GRACE_S)
    os._exit(0)


def _answer(engine: Engine, line: str) -> dict[str, Any]:
    number: Any = None
    try:
        message = json.loads(line)
        number = message.get("id")
        request = Request.from_message(message)
        reply = engine.generate(request)
    except Exception as error:
        traceback.print_exc()
        return {"id": number, "error": _sentence(error)}
    return {"id": number, "prompt_tokens": len(request.prompt_ids), **asdict(reply)}


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip()
