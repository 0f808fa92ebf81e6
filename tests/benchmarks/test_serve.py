"""The benchmark of servers, with toy servers in place of engines."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.serve import ServeRun, ServeSettings, run_serve, summarise
from specdec.benchmarks.serve_client import ServerClient, ServerError
from specdec.benchmarks.tables import serve_table
from specdec.cli import main
from specdec.cli.bench.serve import split_urls

QUESTIONS = QuestionSet(
    "two", "here", "0" * 64, (Question(1, "math", ("one", "more")), Question(2, "math", ("two", "again")))
)
LINE = '{"question_id": %d, "category": "math", "turns": ["what is %d?"]}\n'


@dataclass
class Toy:
    """What a toy server says, and what it was asked.

    Attributes:
        pieces: of every answer.
        tokens: it counts in it; None to say nothing of it.
        status: of answers.
        break_off: end streams without an end.
        drafts: steps it claims to have drafted in, two of three tokens accepted each; None for no metrics.
        asked: bodies of requests.
    """

    pieces: Sequence[str] = ("a", "bc", "d")
    tokens: int | None = 4
    status: int = 200
    break_off: bool = False
    drafts: int | None = 0
    asked: list[dict[str, Any]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    toy: Toy

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(200, json.dumps({"data": [{"id": "/somewhere/toy-model"}]}))
        elif self.path == "/version":
            self.reply(200, json.dumps({"version": "1.2"}))
        elif self.path == "/metrics" and self.toy.drafts is not None:
            counts = {"num_drafts": 1, "num_draft_tokens": 3, "num_accepted_tokens": 2}
            lines = [f'vllm:spec_decode_{n}_total{{model="x"}} {c * self.toy.drafts}.0' for n, c in counts.items()]
            self.reply(200, "# HELP nothing\n" + "\n".join(lines))
        else:
            self.reply(404, "no")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.toy.asked.append(body)
        if self.toy.status != 200:
            self.reply(self.toy.status, "out of order")
            return
        if self.toy.drafts is not None:
            self.toy.drafts += 1
        self.send_response(200)
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]})
        for piece in self.toy.pieces:
            self.event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        if self.toy.break_off:
            return
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        if self.toy.tokens is not None:
            self.event({"choices": [], "usage": {"completion_tokens": self.toy.tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def serve() -> Iterator[Callable[[Toy], str]]:
    """Starts toy servers and gives their addresses."""
    running: list[ThreadingHTTPServer] = []

    def start(toy: Toy) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("ToyHandler", (Handler,), {"toy": toy}))
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_an_answer_has_its_text_its_count_and_a_time_for_every_piece(serve: Callable[[Toy], str]) -> None:
    toy = Toy()
    client = ServerClient(serve(toy) + "/v1/")
    assert client.models() == ["/somewhere/toy-model"]
    assert client.version() == "1.2"
    answer = client.chat("m", [{"role": "user", "content": "hi"}], 7)
    assert (answer.text, answer.num_tokens, answer.finish_reason) == ("abcd", 4, "stop")
    assert len(answer.arrived_s) == 3
    assert 0 < answer.arrived_s[0] <= answer.arrived_s[-1] <= answer.total_s
    assert (toy.asked[0]["model"], toy.asked[0]["max_tokens"], toy.asked[0]["temperature"]) == ("m", 7, 0.0)


def test_a_server_that_does_not_count_is_counted_by_its_pieces(serve: Callable[[Toy], str]) -> None:
    assert ServerClient(serve(Toy(tokens=None))).chat("m", [], 7).num_tokens == 3


@pytest.mark.parametrize(
    ("toy", "message"),
    [(Toy(status=503), "status 503: out of order"), (Toy(break_off=True), "ended a stream before the answer did")],
)
def test_a_server_that_fails_is_an_error(serve: Callable[[Toy], str], toy: Toy, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        ServerClient(serve(toy)).chat("m", [], 7)


def test_a_server_that_is_not_there_is_an_error(serve: Callable[[Toy], str]) -> None:
    with pytest.raises(ServerError, match="cannot be reached"):
        ServerClient("http://127.0.0.1:9").models()
    with pytest.raises(ValueError, match="got 'localhost:8000'"):
        ServerClient("localhost:8000")


def test_servers_without_metrics_have_no_tau(serve: Callable[[Toy], str]) -> None:
    client = ServerClient(serve(Toy(drafts=None)))
    result = run_serve({"a": client}, ServeSettings("toy", baseline="a"), QUESTIONS)
    (row,) = result["summary"]["servers"]
    assert (row["tau"], row["speedup"], row["equal_texts"], row["num_runs"]) == (None, None, None, 2)


def test_servers_answer_in_turn_and_are_compared(serve: Callable[[Toy], str], tmp_path: Path) -> None:
    toys = {"plain": Toy(), "same": Toy(), "other": Toy(pieces=("x", "y"))}
    clients = {name: ServerClient(serve(toy)) for name, toy in toys.items()}
    settings = ServeSettings("toy", "bf16", 16, turns=2, concurrency=1, repeat=2, baseline="plain")
    out, seen = tmp_path / "serve.json", []
    result = run_serve(
        clients, settings, QUESTIONS, out=out, progress=lambda runs, total: seen.append((len(runs), total))
    )
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert [run["server"] for run in result["runs"][::2]] == [
        "plain", "same", "other", "same", "other", "plain", "other", "plain", "same", "plain", "same", "other",
    ]  # fmt: skip
    assert seen[-1] == (24, 24)
    rows = {row["name"]: row for row in result["summary"]["servers"]}
    assert [rows[name]["equal_texts"] for name in toys] == [None, 8, 0]
    assert rows["plain"]["speedup"] is None
    # Of eight answers each: the warm-up is not counted.
    assert [(row["drafts"], row["drafted"], row["accepted"], row["tau"]) for row in rows.values()] == [
        (8, 24, 16, 3)
    ] * 3
    second = toys["plain"].asked[2]["messages"]
    assert [message["content"] for message in second] == ["one", "abcd", "more"]
    table = serve_table(result)
    assert "| other | 1.2 |" in table
    assert "0 of 8" in table
    assert "one request at a time" in table


def make_run(server: str, block: int, num_tokens: int, block_ms: float, **changes: Any) -> ServeRun:
    values = {"ttft_ms": 10.0, "token_ms": 2.0, "total_ms": block_ms, "text": "t", "turn": 1, "repeat": 0} | changes
    return ServeRun(block=block, question_id=block, server=server, num_tokens=num_tokens, block_ms=block_ms, **values)


def test_speed_is_of_whole_blocks_and_their_ratios_are_paired() -> None:
    runs = [make_run("plain", 0, 10, 1000.0), make_run("plain", 1, 10, 500.0)]
    runs += [make_run("fast", 0, 10, 500.0), make_run("fast", 1, 10, 250.0, text="u", ttft_ms=None, token_ms=None)]
    none = dict.fromkeys(("drafts", "drafted", "accepted"), 0)
    plain, fast = summarise(runs, {"plain": none, "fast": none}, ServeSettings("m", baseline="plain"))
    assert plain["tokens_per_s"] == pytest.approx(20 / 1.5)
    assert fast["tokens_per_s"] == pytest.approx(20 / 0.75)
    assert fast["speedup"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert (fast["equal_texts"], fast["num_runs"]) == (1, 2)
    assert fast["ttft_ms"] == {"p50": 10.0, "p95": 10.0}


def test_answers_of_a_block_share_its_time() -> None:
    runs = [make_run("a", 0, 10, 1000.0), make_run("a", 0, 30, 1000.0)]
    (row,) = summarise(runs, {"a": {"drafts": 2, "drafted": 8, "accepted": 3}}, ServeSettings("m", concurrency=2))
    assert row["tokens_per_s"] == 40
    assert row["tau"] == 2.5


def test_the_command_writes_the_result_and_prints_a_line_a_server(serve: Callable[[Toy], str], tmp_path: Path) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "out.json"
    questions.write_text("".join(LINE % (n, n) for n in range(3)))
    arguments = ["bench", "serve", "--base-url", f"plain={serve(Toy())}/v1", "--base-url", f"ours={serve(Toy())}/v1"]
    found = CliRunner().invoke(main, [*arguments, "--questions", str(questions), "--limit", "2", "--json", str(out)])
    assert found.exit_code == 0, found.output
    assert "ours: " in found.stdout
    assert "2 of 2 texts equal" in found.stdout
    assert "tau 3.00" in found.stdout
    written = json.loads(out.read_text())
    assert written["settings"]["model"] == "toy-model"
    assert written["settings"]["baseline"] == "plain"
    assert str(tmp_path) not in out.read_text()


def test_servers_have_names() -> None:
    assert split_urls(["http://a:1/v1", "x=http://b/v1"]) == {"a:1": "http://a:1/v1", "x": "http://b/v1"}
    with pytest.raises(ValueError, match="two servers are called 'a:1'"):
        split_urls(["http://a:1/v1", "http://a:1"])
    with pytest.raises(ValueError, match=r"takes \[NAME=\]URL"):
        split_urls(["x="])


def test_an_unknown_baseline_is_named() -> None:
    found = CliRunner().invoke(main, ["bench", "serve", "--base-url", "a=http://x", "--baseline", "b"])
    assert found.exit_code == 2
    assert "unknown server 'b'" in found.output


@pytest.mark.parametrize("name", ["max_new_tokens", "turns", "concurrency", "repeat"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ServeSettings("m", **{name: 0})
