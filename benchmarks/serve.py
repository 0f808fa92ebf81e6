"""Answers of OpenAI-compatible servers to MT-Bench's questions: throughput and latency, side by side in one run.

The servers, one with speculation and one without for example, answer a block of questions each before the next block
begins, in an order that rotates, so that what changes on the machine meets all alike. A block is as many questions as
are asked at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.benchmarks import record
from specdec.benchmarks.masking import masked
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.schema import SCHEMA
from specdec.benchmarks.serve_client import Answer, ServerClient
from specdec.benchmarks.summary import bootstrap

KIND = "serve"
WARM_UP = "Say hello."
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class ServeSettings:
    """What is run.

    Attributes:
        model: name of the model for the record.
        dtype: what the servers compute in, for the record; they do not say.
        max_new_tokens: most tokens per answer.
        turns: turns of each question, 1 or 2.
        concurrency: questions asked at a time.
        repeat: times everything is run.
        baseline: name of the server that the others are compared with.
        seed: of the intervals.
    """

    model: str
    dtype: str = ""
    max_new_tokens: int = 128
    turns: int = 1
    concurrency: int = 1
    repeat: int = 1
    baseline: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "turns", "concurrency", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ServeRun:
    """One answer.

    Attributes:
        repeat: from 0.
        block: number of the block of questions it was in.
        question_id: the question.
        turn: from 1.
        server: which answered.
        num_tokens: of the answer.
        ttft_ms: from the request to the first piece of text; None where none came.
        token_ms: from there to the last piece, per further token; None where there is none.
        total_ms: from the request to the end.
        block_ms: from the block's first request to the end of its last answer, all turns.
        text: the answer.
    """

    repeat: int
    block: int
    question_id: int
    turn: int
    server: str
    num_tokens: int
    ttft_ms: float | None
    token_ms: float | None
    total_ms: float
    block_ms: float
    text: str


def run_serve(
    servers: Mapping[str, ServerClient],
    settings: ServeSettings,
    questions: QuestionSet,
    *,
    out: Path | None = None,
    progress: Callable[[Sequence[ServeRun], int], None] | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Ask all servers all questions; the result, as it is written to ``out``.

    Args:
        servers: by name.
        settings: what to run.
        questions: the questions.
        out: the JSON file to write, without paths of this machine.
        progress: called with all runs, and how many there will be, after every block.
        command: for the record.

    Raises:
        ServerError: where a server cannot be reached or breaks off.
    """
    date, commit, machine = _now(), record.commit(), record.machine(torch.device("cpu"))
    models = {name: client.models()[0] for name, client in servers.items()}
    for name, client in servers.items():
        client.chat(models[name], [{"role": "user", "content": WARM_UP}], WARM_UP_TOKENS)
    asked, size = questions.questions, settings.concurrency
    blocks = [asked[start : start + size] for start in range(0, len(asked), size)]
    total = settings.repeat * len(asked) * settings.turns * len(servers)
    runs: list[ServeRun] = []
    counts = {name: dict.fromkeys(("drafts", "drafted", "accepted"), 0) for name in servers}
    order = list(servers)
    with ThreadPoolExecutor(size) as pool:
        for repeat in range(settings.repeat):
            for index, block in enumerate(blocks):
                for name in order:
                    before = servers[name].speculation()
                    runs += _ask(servers[name], name, models[name], settings, repeat, index, block, pool)
                    after = servers[name].speculation()
                    for key, value in after.items():
                        counts[name][key] += value - before.get(key, 0)
                    if progress is not None:
                        progress(runs, total)
                order = [*order[1:], order[0]]
    result = {
        "schema": SCHEMA,
        "kind": KIND,
        "date": date,
        "commit": commit,
        "command": list(command),
        "machine": machine,
        "versions": record.versions(),
        "settings": asdict(settings),
        "questions": questions.to_json(),
        "servers": [{"name": name, "version": client.version()} for name, client in servers.items()],
        "runs": [asdict(run) for run in runs],
        "summary": {"servers": summarise(runs, counts, settings)},
    }
    if out is not None:
        record.write_json(out, masked(result))
    return result


def _ask(
    client: ServerClient,
    name: str,
    model: str,
    settings: ServeSettings,
    repeat: int,
    index: int,
    block: Sequence[Question],
    pool: ThreadPoolExecutor,
) -> list[ServeRun]:
    """A server's answers to a block, asked at a time."""

    def converse(question: Question) -> list[Answer]:
        messages: list[dict[str, str]] = []
        answers = []
        for turn in question.turns[: settings.turns]:
            messages.append({"role": "user", "content": turn})
            answers.append(client.chat(model, messages, settings.max_new_tokens))
            messages.append({"role": "assistant", "content": answers[-1].text})
        return answers

    start = time.perf_counter()
    found = list(pool.map(converse, block))
    block_ms = 1000 * (time.perf_counter() - start)
    return [
        ServeRun(
            repeat=repeat, block=index, question_id=question.question_id, turn=turn, server=name,
            num_tokens=answer.num_tokens, ttft_ms=1000 * answer.arrived_s[0] if answer.arrived_s else None,
            token_ms=_token_ms(answer), total_ms=1000 * answer.total_s, block_ms=block_ms, text=answer.text,
        )
        for question, answers in zip(block, found, strict=True)
        for turn, answer in enumerate(answers, start=1)
    ]  # fmt: skip


def _token_ms(answer: Answer) -> float | None:
    """Milliseconds per token after the first piece, as users see them: pieces of several tokens count for each."""
    if len(answer.arrived_s) < 2 or answer.num_tokens < 2:
        return None
    return 1000 * (answer.arrived_s[-1] - answer.arrived_s[0]) / (answer.num_tokens - 1)


def summarise(
    runs: Sequence[ServeRun], counts: Mapping[str, Mapping[str, int]], settings: ServeSettings
) -> list[dict[str, Any]]:
    """Figures by server, in the order of ``counts``.

    Args:
        runs: all answers.
        counts: drafts, drafted and accepted tokens by server; zeros where it does not say.
        settings: of the run.
    """
    texts = {(run.repeat, run.question_id, run.turn): run.text for run in runs if run.server == settings.baseline}
    rates = {name: _block_rates(runs, name) for name in counts}
    found = []
    for name, counted in counts.items():
        mine = [run for run in runs if run.server == name]
        compared = name != settings.baseline and settings.baseline in counts
        tokens = sum(rate[0] for rate in rates[name].values())
        seconds = sum(rate[1] for rate in rates[name].values()) / 1000
        found.append({
            "name": name,
            "tokens_per_s": tokens / seconds if seconds else None,
            "speedup": _speedup(rates[name], rates[settings.baseline], settings.seed) if compared else None,
            "ttft_ms": _percentiles([run.ttft_ms for run in mine]),
            "token_ms": _percentiles([run.token_ms for run in mine]),
            "total_ms": _percentiles([run.total_ms for run in mine]),
            "tau": 1 + counted["accepted"] / counted["drafts"] if counted["drafts"] else None,
            "equal_texts": sum(texts.get((r.repeat, r.question_id, r.turn)) == r.text for r in mine)
            if compared else None,
            "num_runs": len(mine),
            **counted,
        })  # fmt: skip
    return found


def _block_rates(runs: Sequence[ServeRun], server: str) -> dict[tuple[int, int], tuple[int, float]]:
    """Tokens and milliseconds of a server's blocks, by repeat and number."""
    found: dict[tuple[int, int], tuple[int, float]] = {}
    for run in runs:
        if run.server == server:
            tokens, _ = found.get((run.repeat, run.block), (0, 0.0))
            found[run.repeat, run.block] = (tokens + run.num_tokens, run.block_ms)
    return found


def _speedup(
    mine: Mapping[tuple[int, int], tuple[int, float]], base: Mapping[tuple[int, int], tuple[int, float]], seed: int
) -> dict[str, float] | None:
    """Median ratio of tokens per second, blocks paired, and its interval."""
    ratios: dict[tuple[int, ...], list[float]] = {}
    for (repeat, block), (tokens, milliseconds) in sorted(mine.items()):
        others = base.get((repeat, block))
        if others and others[0] and tokens:
            ratios.setdefault((block,), []).append(tokens / milliseconds / (others[0] / others[1]))
    interval = bootstrap(ratios, seed)
    return None if interval is None else asdict(interval)


def _percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    """The 50th and 95th of those that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    p50, p95 = np.percentile(known, [50, 95])
    return {"p50": float(p50), "p95": float(p95)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
