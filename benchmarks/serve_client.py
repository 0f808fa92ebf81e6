"""A client of OpenAI-compatible servers that takes the time of every piece of a streamed answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, urlsplit

TIMEOUT_S = 600.0


class ServerError(RuntimeError):
    """A server cannot be reached, or answered with something else than an answer."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        text: whole.
        num_tokens: as the server counts them, else the pieces that came.
        arrived_s: seconds from the request to each piece of text.
        total_s: from the request to the end of the stream.
        finish_reason: "stop", "length", ...
    """

    text: str
    num_tokens: int
    arrived_s: Sequence[float]
    total_s: float
    finish_reason: str | None


class ServerClient:
    """Talks to one server; may be used by several threads, every request has a connection of its own.

    Args:
        base_url: as OpenAI's clients take it, with or without "/v1".

    Raises:
        ValueError: where the address is none.
    """

    def __init__(self, base_url: str) -> None:
        self._parts: SplitResult = urlsplit(base_url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise ValueError(f"a base URL is http://HOST:PORT or https://HOST, got {base_url!r}")
        self._root = self._parts.path.rstrip("/").removesuffix("/v1")

    def models(self) -> list[str]:
        """Names of the models served, at least one."""
        found = self._get("/v1/models")
        try:
            names = [str(model["id"]) for model in json.loads(found)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self._address} does not list models as OpenAI's interface does: {error}") from error
        if not names:
            raise ServerError(f"{self._address} serves no model")
        return names

    def version(self) -> str | None:
        """The engine's version where the server says it, as vLLM does."""
        try:
            return str(json.loads(self._get("/version"))["version"])
        except (ServerError, ValueError, KeyError, TypeError):
            return None

    def speculation(self) -> dict[str, int]:
        """vLLM's running totals: ``drafts`` (steps of a request), ``drafted`` and ``accepted`` tokens; {} elsewhere."""
        names = {"drafts": "num_drafts", "drafted": "num_draft_tokens", "accepted": "num_accepted_tokens"}
        found: dict[str, int] = {}
        try:
            lines = self._get("/metrics").splitlines()
        except ServerError:
            return {}
        for name, counter in names.items():
            for line in lines:
                if line.startswith(f"vllm:spec_decode_{counter}_total"):
                    found[name] = found.get(name, 0) + int(float(line.rsplit(" ", 1)[1]))
        return found

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> Answer:
        """Stream a greedy answer.

        Raises:
            ServerError: where it is refused or breaks off.
        """
        body = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        connection = self._connect()
        try:
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("POST", f"{self._root}/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                said = response.read(500).decode("utf-8", "replace")
                raise ServerError(f"{self._address} refused a chat with status {response.status}: {said}")
            return _read_answer(response, start, self._address)
        except (OSError, HTTPException) as error:
            raise ServerError(f"{self._address} broke off an answer ({type(error).__name__}: {error})") from error
        finally:
            connection.close()

    @property
    def _address(self) -> str:
        return f"{self._parts.scheme}://{self._parts.netloc}"

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=TIMEOUT_S)

    def _get(self, path: str) -> str:
        connection = self._connect()
        try:
            connection.request("GET", self._root + path)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            raise ServerError(f"{self._address} cannot be reached ({type(error).__name__}: {error})") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"{self._address}{path} answered with status {response.status}")
        return text


def _read_answer(response: HTTPResponse, start: float, address: str) -> Answer:
    pieces: list[str] = []
    arrived: list[float] = []
    counted: int | None = None
    reason: str | None = None
    done = False
    for event in _events(response):
        now = time.perf_counter() - start
        if event == "[DONE]":
            done = True
            break
        try:
            chunk = json.loads(event)
        except ValueError as error:
            raise ServerError(f"{address} streamed {event[:80]!r}, which is no JSON") from error
        if "error" in chunk:
            raise ServerError(f"{address} broke off an answer: {chunk['error']}")
        usage = chunk.get("usage")
        if usage:
            counted = int(usage["completion_tokens"])
        for choice in chunk.get("choices") or ():
            piece = choice.get("delta", {}).get("content")
            if piece:
                pieces.append(piece)
                arrived.append(now)
            reason = choice.get("finish_reason") or reason
    if not done and reason is None:
        raise ServerError(f"{address} ended a stream before the answer did")
    total = time.perf_counter() - start
    return Answer("".join(pieces), len(pieces) if counted is None else counted, arrived, total, reason)


def _events(response: HTTPResponse) -> Iterator[str]:
    """What server-sent events carry."""
    for raw in response:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()
