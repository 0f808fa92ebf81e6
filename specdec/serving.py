"""Requests from many clients on one decoder: rows join and leave the batch between passes (Orca, Yu et al. 2022).

Requests are served first come, first served, each by its own parameters. Where the acceptance policy is one that needs
all rows alike (any but greedy and coupled ones), a request with other parameters waits until the running ones have
ended, and so do those behind it, so that none waits for ever.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec.batch import Row
from specdec.generation import Generation
from specdec.prompts import Prompt
from specdec.result import GenerationResult, StreamPiece
from specdec.sampling import SamplingParams

if TYPE_CHECKING:
    from specdec.decoder import SpecDecoder


@dataclass(eq=False)
class _Request:
    row: Row
    params: SamplingParams
    pieces: asyncio.Queue[StreamPiece | None] = field(default_factory=asyncio.Queue)
    index: int = -1
    error: BaseException | None = None


class ServedStream(AsyncIterator[StreamPiece]):
    """One request's pieces as they come; ``result`` holds what there is so far at any time.

    Decoding does not wait for the reader: pieces that are not read yet are kept, a token each. A request whose stream
    nobody reads any more runs to its end unless it is cancelled.
    """

    def __init__(self, request: _Request, server: Server) -> None:
        self._request = request
        self._server = server
        self._ended = False

    async def __anext__(self) -> StreamPiece:
        if self._ended:
            raise StopAsyncIteration
        piece = await self._request.pieces.get()
        if piece is None:
            self._ended = True
            if self._request.error is not None:
                raise self._request.error
            raise StopAsyncIteration
        return piece

    def cancel(self) -> None:
        """End the request as "cancelled"; its place is free after the pass in flight. Pieces so far stay readable."""
        self._server._cancel(self._request)

    async def wait(self) -> GenerationResult:
        """Read to the end; returns the result."""
        async for _ in self:
            pass
        return self.result

    @property
    def result(self) -> GenerationResult:
        """What there is of the answer."""
        return GenerationResult.of(self._request.row)


class Server:
    """Serves requests while its ``async with`` block is open; ``SpecDecoder.serve`` makes it.

    Leaving the block waits for what is running and waiting; an exception in it cancels that. The decoder serves nothing
    else meanwhile: a ``generate`` or ``stream`` ends the server, and its requests finish as "cancelled".

    Args:
        decoder: runs them.
        max_rows: decoded at a time.
        max_waiting: requests that may wait; beyond that ``submit`` waits for its turn. Nothing else is held back.
        pass_tokens: nodes of a pass, those of decoding rows and of prompts that ride along.
    """

    def __init__(self, decoder: SpecDecoder, max_rows: int, max_waiting: int, pass_tokens: int) -> None:
        limits = (("max_rows", max_rows), ("max_waiting", max_waiting), ("pass_tokens", pass_tokens))
        for name, value in limits:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._decoder = decoder
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._pass_tokens = pass_tokens
        self._waiting: deque[_Request] = deque()
        self._blocked: dict[_Request, asyncio.Future[bool]] = {}  # in order; only while as many wait as may
        self._running: dict[int, _Request] = {}
        self._cancelled: list[_Request] = []
        self._generation: Generation | None = None
        self._passes: Generator[list[StreamPiece], None, None] | None = None
        self._params: SamplingParams | None = None
        self._pass = threading.Lock()  # held while the decoder's thread computes
        self._changed = asyncio.Event()
        self._closing = False
        self._closed = True
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Server:
        self._decoder._take_over(self)
        self._closed = self._closing = False
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        self._closing = True
        if kind is not None:
            self.close()
        self._let_in()
        self._changed.set()
        if self._worker is not None:
            await self._worker
        self.close()

    async def submit(self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any) -> ServedStream:
        """Hand in a request; waits while as many wait as may.

        Args:
            prompt: text, token ids or chat messages.
            params: how to choose and where to end.
            fields: fields of ``SamplingParams``, as keywords.

        Raises:
            ValueError: for a prompt or parameters that cannot be served, or a request that memory has no room for even
                alone.
            RuntimeError: where the server is closed, or is being closed while this waits.
        """
        row, params = self._decoder._make_request(prompt, params, fields)
        request = _Request(row, params)
        if self._closed or self._closing:
            raise RuntimeError("the server is closed: open another with decoder.serve(), and submit within its block")
        if len(self._waiting) < self._max_waiting:
            self._waiting.append(request)
            self._changed.set()
        elif not await self._turn(request):
            raise RuntimeError(
                "the server was closed while this request waited to be handed in: open another with decoder.serve(), "
                "and submit it there"
            )
        return ServedStream(request, self)

    @property
    def between_passes(self) -> AbstractContextManager[object]:
        """Within it no pass runs."""
        return self._pass

    def close(self) -> None:
        """End everything as "cancelled", after the pass in flight."""
        self._closed = True
        with self._pass:
            if self._passes is not None:
                self._passes.close()
            self._passes = self._generation = None
        for request in [*self._running.values(), *self._waiting]:
            self._end(request, "cancelled")
        self._running.clear()
        self._waiting.clear()
        self._let_in()
        self._changed.set()

    async def _turn(self, request: _Request) -> bool:
        """Wait until the request is in the queue; False where the server closes first."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._blocked[request] = turn
        try:
            return await turn
        except asyncio.CancelledError:
            self._blocked.pop(request, None)
            if not turn.cancelled() and turn.result():  # it was let in before its client could go on
                self._cancel(request)
            raise

    def _let_in(self) -> None:
        """Wake blocked clients, in order: those there is room for, and all where no more is taken in.

        Whatever shortens the queue or ends the server calls this, before anything else can run.
        """
        ended = self._closed or self._closing
        while self._blocked and (ended or len(self._waiting) < self._max_waiting):
            request = next(iter(self._blocked))
            turn = self._blocked.pop(request)
            if turn.done():  # its client was cancelled
                continue
            if not ended:
                self._waiting.append(request)
            turn.set_result(not ended)

    async def _work(self) -> None:
        """Serve until closed; closed it is however this ends."""
        try:
            await self._serve()
        finally:
            self.close()

    async def _serve(self) -> None:
        """Admit, compute a pass in a thread, hand out its pieces; until closed."""
        while not self._closed:
            for request in self._cancelled:
                self._drop(request)
            self._cancelled.clear()
            self._admit()
            if self._passes is None:
                if self._closing and not self._waiting:
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            try:
                pieces = await asyncio.to_thread(self._one_pass)
            except Exception as error:  # every client learns of it, whatever it is
                for request in self._running.values():
                    request.error = error
                raise
            for piece in pieces or ():
                if piece.index in self._running:  # else closed meanwhile
                    self._running[piece.index].pieces.put_nowait(piece)
            for index, request in [*self._running.items()]:
                if request.row.finish_reason is not None:
                    del self._running[index]
                    request.pieces.put_nowait(None)
            if pieces is None:
                self._passes = self._generation = None

    def _one_pass(self) -> list[StreamPiece] | None:
        """The next pass' pieces; None where all rows have ended."""
        with self._pass:
            return None if self._passes is None else next(self._passes, None)

    def _admit(self) -> None:
        """Move requests from the queue to the batch, in order, as places and memory allow."""
        self._foresee()
        while self._waiting and len(self._running) < self._max_rows:
            request = self._waiting[0]
            try:
                if not self._may_join(request):
                    break
                if self._generation is None:
                    self._begin(request)
            except ValueError as error:  # less memory is free than when it was handed in
                request.error = error
                self._end(request, "error")
                self._unqueue(request)
                continue
            assert self._generation is not None
            request.index = self._generation.add(request.row)
            self._running[request.index] = request
            self._unqueue(request)

    def _foresee(self) -> None:
        """Tell the generation who waits to join it, so that what they share is computed once."""
        if self._generation is not None:
            self._generation.foresee([each.row for each in itertools.takewhile(self._is_alike, self._waiting)])

    def _is_alike(self, request: _Request) -> bool:
        """Whether a request's parameters let it join those that run."""
        coupled = self._generation is not None and self._generation.verifier.coupled
        return coupled or _choice(request.params) == _choice(self._params)

    def _may_join(self, request: _Request) -> bool:
        """Whether a request may run beside those that run.

        Where none does, and what is held for others leaves no room, the generation ends and another begins with it.
        """
        if self._generation is None:
            return True
        rows = [*(running.row for running in self._running.values()), request.row]
        try:
            return self._is_alike(request) and self._decoder._fits(rows, self._generation.shared_work(rows))
        except ValueError:
            return False

    def _begin(self, request: _Request) -> None:
        """A generation for requests such as this one."""
        self._params, verifier = request.params, self._decoder._serving_verifier(request.params)
        self._generation = self._decoder._make_generation(
            [request.row], request.params, verifier, self._max_rows, pass_tokens=self._pass_tokens, start=()
        )
        self._passes = self._generation.passes()
        self._foresee()

    def _cancel(self, request: _Request) -> None:
        self._cancelled.append(request)
        self._changed.set()

    def _drop(self, request: _Request) -> None:
        """End a cancelled request; between passes only."""
        if request.row.finish_reason is not None:
            return
        if request in self._waiting:
            self._unqueue(request)
        elif self._generation is not None:
            self._generation.cancel(request.row)
            self._running.pop(request.index, None)
        self._end(request, "cancelled")

    def _unqueue(self, request: _Request) -> None:
        self._waiting.remove(request)
        self._let_in()

    def _end(self, request: _Request, reason: Any) -> None:
        if request.row.finish_reason is None:
            request.row.finish_reason = reason
        request.pieces.put_nowait(None)


def _choice(params: SamplingParams | None) -> tuple[Any, ...] | None:
    """What chooses a token; rows of a batch have it in common. A seed matters to which trees may be drafted."""
    return None if params is None else (*params.choice, params.seed is None)
