"""A peer at work: its worker process, the pipe to it, and what happens when it hangs or dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from specdec.benchmarks.peers.base import PeerDied, PeerError, PeerFailed, PeerHello, PeerReply, PeerSpec, PeerTimeout

__all__ = ["PeerProcess", "worker_command"]

WORKER_FOLDER = Path(__file__).parent / "workers"
LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 8192


def worker_command(
    spec: PeerSpec,
    weights: Path,
    *,
    python: Path,
    threads: int,
    draft_model: Path | None = None,
    max_context: int = 4096,
) -> list[str]:
    """The command line that starts a peer's worker.

    Args:
        spec: the peer.
        weights: what `prepare_weights` made for it.
        python: the interpreter in which its engine is installed.
        threads: threads the engine may compute with.
        draft_model: folder of the draft model, for peers that need one.
        max_context: tokens of prompt and output that the engine must have room for.

    Raises:
        ValueError: `threads` is not positive, or the peer needs a draft model and none is given (or the reverse).
    """
    if threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    if spec.needs_draft_model != (draft_model is not None):
        rule = "needs a draft model" if spec.needs_draft_model else "takes no draft model"
        raise ValueError(f"the peer {spec.name} {rule}, got {draft_model}")
    # -E -s: this interpreter's PYTHONPATH and user packages must not reach into the engine's environment.
    command = [str(python), "-E", "-s", "-u", str(WORKER_FOLDER / spec.engine.worker)]
    command += ["--weights", str(weights), "--threads", str(threads), "--max-context", str(max_context)]
    command += ["--precision", spec.precision, "--speculation", spec.speculation]
    command += ["--draft-len", str(spec.draft_len), "--max-ngram", str(spec.max_ngram)]
    if draft_model is not None:
        command += ["--draft-model", str(draft_model)]
    return command


class PeerProcess:
    """A worker, started on entering the context and gone on leaving it.

    The worker leads a process group of its own, so that what it starts goes with it. Every wait has a limit: past it
    the whole group is killed, and `PeerTimeout` raised. After any error but `PeerFailed` the worker is gone and further
    requests raise. One request runs at a time; the object is not safe for use from several threads.

    Args:
        command: the worker's command line, from `worker_command`.
        name: the peer's name, for messages.
        log_path: file to which the worker's standard error, and whatever it prints, is appended.
        start_timeout_s: seconds for loading, compiling and warming up.
        reply_timeout_s: seconds for one reply.
        close_timeout_s: seconds to end by itself once its input is closed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        log_path: Path,
        start_timeout_s: float = 600.0,
        reply_timeout_s: float = 300.0,
        close_timeout_s: float = 10.0,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = list(command)
        self._start_timeout_s = start_timeout_s
        self._reply_timeout_s = reply_timeout_s
        self._close_timeout_s = close_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._log_start = 0
        self._num_requests = 0

    def __enter__(self) -> PeerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the worker is there to answer."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Number of the worker's process and of the group it leads; None while it is not running."""
        return self._process.pid if self._process is not None and self.running else None

    def start(self) -> PeerHello:
        """Start the worker and wait until it has loaded its weights and warmed up.

        Raises:
            PeerError: it is running already, or its interpreter cannot be started.
            PeerTimeout, PeerDied, PeerFailed: it did not get ready; it is gone.
        """
        if self.running:
            raise PeerError(f"the peer {self.name} is running already")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                    start_new_session=True,
                )
            except OSError as error:
                raise PeerError(f"the peer {self.name} cannot be started with {self._command[0]}: {error}") from error
        try:
            message = self._exchange(None, self._start_timeout_s, "load")
            if "error" in message:
                raise PeerFailed(f"the peer {self.name} did not load: {message['error']} (log: {self.log_path})")
            notes = tuple(str(note) for note in message.get("notes", []))
            return PeerHello(str(message.get("version", "unknown")), float(message.get("load_ms", 0.0)), notes)
        except BaseException:
            self.kill()
            raise

    def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int], *, ignore_eos: bool = False
    ) -> PeerReply:
        """Continue a prompt greedily.

        Args:
            prompt_ids: ids of the whole prompt, chat template applied.
            max_new_tokens: most tokens to generate.
            eos_ids: ids that end the text; the one that ends it is part of the reply.
            ignore_eos: go on to `max_new_tokens` past any of them.

        Raises:
            PeerFailed: the worker answered with an error; it is still running.
            PeerTimeout, PeerDied: no answer, or no valid one; the worker is gone.
            PeerError: the worker is not running.
        """
        self._num_requests += 1
        request = {
            "id": self._num_requests,
            "prompt_ids": list(prompt_ids),
            "max_new_tokens": max_new_tokens,
            "greedy": True,
            "ignore_eos": ignore_eos,
            "eos_ids": list(eos_ids),
        }
        try:
            message = self._exchange(request, self._reply_timeout_s, "reply")
            if message.get("id") != self._num_requests:
                raise self._died(f"answered request {message.get('id')!r} in place of {self._num_requests}")
            if "error" not in message:
                return self._read_reply(message, len(prompt_ids), max_new_tokens)
        except BaseException:
            self.kill()  # an answer that comes late would be taken for the next one's
            raise
        raise PeerFailed(f"the peer {self.name} failed: {message['error']}")

    def close(self) -> None:
        """Close the worker's input and wait for its end; kill it if that takes too long. Safe to repeat."""
        process = self._process
        if process is None:
            return
        try:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(self._close_timeout_s)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        """End the worker and all it started, at once. Does nothing where it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill_group(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            _close(pipe)

    def _read_reply(self, message: dict[str, Any], prompt_len: int, max_new_tokens: int) -> PeerReply:
        try:
            reply = PeerReply.from_message(message)
        except ValueError as error:
            raise self._died(f"sent an invalid reply: {error}") from error
        if reply.prompt_tokens != prompt_len or len(reply.token_ids) > max_new_tokens:
            lengths = f"{reply.prompt_tokens} prompt tokens and {len(reply.token_ids)} new ones"
            raise self._died(f"answered for {lengths} where {prompt_len} and at most {max_new_tokens} were asked for")
        return reply

    def _exchange(self, request: dict[str, Any] | None, timeout_s: float, what: str) -> dict[str, Any]:
        """Send a request, if any, and read one line.

        A timer kills the worker's group when the time is up, which ends a blocked write as well as a blocked read.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise PeerError(f"the peer {self.name} is not running")
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            _kill_group(process)

        timer = threading.Timer(timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, UnicodeDecodeError):
            line = ""
        finally:
            timer.cancel()
        if expired.is_set():
            limit = f"did not {what} within {timeout_s:g} s and was killed"
            raise PeerTimeout(f"the peer {self.name} {limit}{self._log_tail()}")
        if not line:
            raise self._died(f"ended before it could {what}")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise self._died(f"broke the protocol with the line {line.strip()!r:.200}")
        return message

    def _died(self, what: str) -> PeerDied:
        return PeerDied(f"the peer {self.name} {what}{self._log_tail()}")

    def _log_tail(self) -> str:
        """The last lines that this worker left in the log, as the end of a message."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        tail = "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:])
        return f"; its log {self.log_path} ends with\n{tail}" if tail else f"; its log {self.log_path} is empty"


def _kill_group(process: subprocess.Popen[str]) -> None:
    if process.returncode is not None:
        return  # waited for: its number may already be another's
    if os.name != "posix":
        process.kill()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        if process.poll() is None:
            process.kill()


def _close(pipe: IO[str] | None) -> None:
    if pipe is None:
        return
    with contextlib.suppress(OSError):  # what was left to write has no reader any more
        pipe.close()
