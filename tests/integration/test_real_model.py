"""The embedded model writes with every drafter what ``model.generate`` writes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from integration.architectures import describe_difference, generate_alone
from specdec import SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.drafters.weights import TargetFacts, find_weights, load_weights
from specdec.registry import create_drafter
from specdec.target import HFTarget

MT_BENCH = Path(__file__).parents[2] / ".." / "shared" / "data" / "mt_bench.jsonl"
TRAINED = ("medusa", "clover", "eagle", "ppd")
DRAFTERS = ("none", "ngram", "suffix", "recycling", "lookahead", "skip", "model", *TRAINED)
PROMPTS = [
    "The capital of France is",
    "Numbers: one, two, three, four, one, two, three, four, one, two, three,",
]
NEW_TOKENS = 12

pytestmark = pytest.mark.real_model


@cache
def loaded() -> Any:
    """SmolLM2 in float32, skipped where its weights are not to be had."""
    models = pytest.importorskip("specdec.models")
    try:
        return models.load_model("smollm2", dtype="float32", device="cpu")
    except models.ModelNotFoundError as error:
        pytest.skip(str(error))


@cache
def target() -> HFTarget:
    return HFTarget(loaded().model)


@cache
def greedy(prompt: tuple[int, ...], max_new_tokens: int) -> list[int]:
    return generate_alone(loaded().model, prompt, max_new_tokens)


def decoder_with(name: str) -> SpecDecoder:
    """``model`` is the target as its own draft model: no second one comes with the package."""
    drafter: Drafter = (
        ModelDrafter(ModelConfig(depth=3, beams=2, max_nodes=7), model=loaded().model)
        if name == "model"
        else create_drafter(name)
    )
    return SpecDecoder(target(), drafter, tokenizer=loaded().tokenizer, adaptive=False, on_drafter_error="raise")


def assert_equal_texts(name: str, prompts: list[list[int]], results: list[Any], max_new_tokens: int) -> None:
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        expected = greedy(tuple(prompt), max_new_tokens)
        difference = describe_difference(loaded().model, prompt, expected, result.token_ids)
        assert result.token_ids == expected, f"{name}, prompt {index}: {difference}"
        assert result.text == loaded().tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("name", DRAFTERS)
def test_text_equals_generate_alone_and_batched(name: str) -> None:
    prompts = [list(loaded().tokenizer(text).input_ids) for text in PROMPTS]
    decoder = decoder_with(name)
    alone = [decoder.generate(text, max_new_tokens=NEW_TOKENS) for text in PROMPTS]
    assert_equal_texts(name, prompts, alone, NEW_TOKENS)
    assert_equal_texts(name, prompts, decoder.generate(PROMPTS, max_new_tokens=NEW_TOKENS), NEW_TOKENS)
    assert (sum(result.stats.accepted for result in alone) > 0) == (name != "none")


@pytest.mark.parametrize("name", DRAFTERS)
def test_mt_bench_first_turns_equal_generate(name: str, request: pytest.FixtureRequest) -> None:
    """In full: ``pytest -k mt_bench --mt-bench-questions 10 --mt-bench-tokens 128``."""
    if not MT_BENCH.is_file():
        pytest.skip(f"{MT_BENCH} is absent")
    questions = request.config.getoption("--mt-bench-questions")
    max_new_tokens = request.config.getoption("--mt-bench-tokens")
    lines = MT_BENCH.read_text(encoding="utf-8").splitlines()[:questions]
    chats = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]
    assert len(chats) == questions
    tokenizer, decoder = loaded().tokenizer, decoder_with(name)
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = list(tokenizer(text, add_special_tokens=False).input_ids)
        assert_equal_texts(name, [prompt], [decoder.chat(chat, max_new_tokens=max_new_tokens)], max_new_tokens)


@pytest.mark.parametrize("name", TRAINED)
def test_weights_that_ship_were_calibrated_and_draft(name: str) -> None:
    decoder = decoder_with(name)
    decoder.generate(PROMPTS, max_new_tokens=NEW_TOKENS)

    assert decoder.stats.accepted > 0
    rates = load_weights(find_weights(name, "", TargetFacts.of(target()))).hit_rates
    assert all(all(0.0 <= rate <= 1.0 for rate in depth) and depth[0] == max(depth) for depth in rates)
    assert rates[0][0] > 0.15  # far above chance, which is about the share of the most frequent token
