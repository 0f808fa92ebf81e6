"""The embedded model with the drafters that ship for it, in a real vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from own_engine import OwnEngine
from run_vllm import OFF, Job, K, Outcome, Run, engine_options, plugin, run_jobs

from specdec.benchmarks.peer_bench import encode_question
from specdec.benchmarks.questions import SHIPPED, load_questions
from specdec.drafters.weights import TargetFacts, find_pretrained, load_weights, save_weights
from specdec.embedded import find_wheel_gguf
from specdec.integrations.vllm.export import export_weights
from specdec.model_files import model_location
from specdec.models import load_model
from specdec.target import HFTarget

pytestmark = pytest.mark.skipif(find_wheel_gguf() is None, reason="the embedded model is not installed")

DRAFTERS: Mapping[str, dict[str, Any]] = {"ngram": {}, "suffix": {"corpus_tokens": 0}, "medusa": {}, "clover": {}}
ABORTED = [0, 5]
DISTURBED = {
    "max_num_batched_tokens": 48,
    "enable_chunked_prefill": True,
    "num_gpu_blocks_override": 12,
    "block_size": 32,
}
"""Chunks of prompts, and room for some of eight requests only."""


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("smollm2", dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def prompts(loaded: Any) -> list[list[int]]:
    """Eight questions of different lengths, as chats."""
    questions = load_questions(SHIPPED).limit(40).questions
    encoded = [encode_question(question, loaded.tokenizer, loaded.model.config.vocab_size) for question in questions]
    by_length = {len(tokens): list(tokens) for tokens in encoded if len(tokens) < 72}
    return [by_length[length] for length in sorted(by_length)][:8]


def make_job(prompts: list[list[int]], speculation: dict[str, Any] | None, **changes: Any) -> Job:
    return Job(engine_options(model_location("smollm2"), speculation, **changes), prompts)


@pytest.fixture(scope="module")
def run_apart(folder: Path, prompts: list[list[int]]) -> Iterator[Run]:
    """With an engine process, in chunks, with cancelled requests and too small a cache."""
    jobs = {}
    for name, options in DRAFTERS.items():
        engine = engine_options(model_location("smollm2"), plugin(name, options), **DISTURBED)
        jobs[name] = Job(engine, prompts, abort=ABORTED, abort_at=12)
    run = Run(jobs, folder / "embedded-apart", multiprocess=True)
    yield run
    run.stop()


@pytest.fixture(scope="module")
def served(folder: Path, prompts: list[list[int]], run_apart: Run) -> dict[str, Outcome]:
    """With the engine in one process with its client, while the others run."""
    jobs = {"plain": make_job(prompts, None)}
    jobs |= {name: make_job(prompts, plugin(name, options)) for name, options in DRAFTERS.items()}
    return run_jobs(jobs, folder / "embedded", multiprocess=False)


@pytest.fixture(scope="module")
def served_apart(run_apart: Run) -> dict[str, Outcome]:
    return run_apart.outcomes()


@pytest.mark.parametrize("name", DRAFTERS)
def test_texts_are_those_without_speculation(served: dict[str, Outcome], name: str) -> None:
    assert served[name].tokens == served["plain"].tokens
    proposer = served[name].proposer
    assert proposer is not None
    assert (proposer["off"], proposer["name"]) == (None, name)
    assert 0 < served[name].accepted <= served[name].drafted


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_are_accepted_as_often_as_by_our_own_engine(
    served: dict[str, Outcome], loaded: Any, prompts: list[list[int]], name: str
) -> None:
    own = OwnEngine(HFTarget(loaded.model), name, DRAFTERS[name])
    assert own.accepted(prompts, served[name].tokens) == served[name].accepted


@pytest.mark.parametrize("name", DRAFTERS)
def test_chunks_cancelled_requests_and_preemption_change_no_text(
    served: dict[str, Outcome], served_apart: dict[str, Outcome], run_apart: Run, name: str
) -> None:
    outcome, plain = served_apart[name], served["plain"]
    assert outcome.preemptions > 0
    assert outcome.accepted > 0
    assert f"specdec drafts with {name}, " in run_apart.log()
    assert OFF not in run_apart.log()
    for index, (mine, other) in enumerate(zip(outcome.tokens, plain.tokens, strict=True)):
        assert mine == (other[: len(mine)] if index in ABORTED else other)
        assert len(mine) < len(other) or index not in ABORTED


def test_medusa_drafts_in_vllm_itself_as_through_the_plugin(
    folder: Path, loaded: Any, prompts: list[list[int]]
) -> None:
    """The blocks that ship, without their maps and over the whole vocabulary: all that vLLM's own has a form for."""
    target = HFTarget(loaded.model)
    shipped = find_pretrained("medusa", TargetFacts.of(target))
    assert shipped is not None
    weights = load_weights(shipped)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in ("vocabulary", "mix")}
    shape = {**weights.shape, "vocab_size": 0, "mixed": False}
    whole = type(weights)(weights.drafter, weights.target, shape, tensors)
    export_weights(whole, target, model_location("smollm2"), "medusa", folder / "exported-medusa", K)
    save_weights(folder / "whole-medusa", whole, card="")
    native = {"method": "medusa", "model": str(folder / "exported-medusa"), "num_speculative_tokens": K}
    everything = {"max_tokens": 100, "abort": list(range(len(prompts))), "abort_at": 12}
    engines = {
        "native": {"speculative_config": native},
        "plugin": plugin("medusa", {"weights": str(folder / "whole-medusa")}),
    }
    jobs = {
        name: Job(engine_options(model_location("smollm2"), engine), prompts, **everything)
        for name, engine in engines.items()
    }
    found = run_jobs(jobs, folder / "embedded-native", multiprocess=False)
    ours, native_outcome = found["plugin"], found["native"]
    assert ours.tokens == native_outcome.tokens
    assert (ours.drafts, ours.drafted) == (native_outcome.drafts, native_outcome.drafted)
    assert ours.accepted == native_outcome.accepted > 0
