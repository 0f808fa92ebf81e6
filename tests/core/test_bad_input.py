"""Bad input gets an error that names the value and says what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import random_model

from specdec import SamplingParams, SpecDecoder
from specdec.drafters.model import ModelDrafter
from specdec.verifiers.match import CoupledVerifier


@pytest.fixture(scope="module")
def decoder() -> SpecDecoder:
    return SpecDecoder(random_model(), "none")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ("", "prompt is empty"),
        ([[1, 2], []], "prompt is empty"),
        ([1, 97], "token 97, outside the vocabulary of 97"),
        ([1] * 256, "256 tokens, the model's context only 256"),
        ("text", "need a tokenizer"),
        ([{"role": "user", "content": "x"}], "no chat template"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        (7, "token ids or chat messages"),
    ],
)
def test_prompts(decoder: SpecDecoder, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.generate(prompt)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0.0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1e-39}, "temperature must be 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"n": 0}, "n must be at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ""}, "stop strings must not be empty"),
        ({"stop": "x"}, "stop strings need a tokenizer"),
        ({"temprature": 1.0}, "unknown sampling parameter 'temprature'; did you mean 'temperature'"),
    ],
)
def test_sampling_parameters(decoder: SpecDecoder, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.generate([1, 2], SamplingParams(), **fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "ngrm"}, "unknown drafter 'ngrm'; did you mean 'ngram'"),
        ({"drafter": "ngram", "drafter_options": {"max_node": 3}}, "did you mean 'max_nodes'"),
        ({"drafter": "ngram", "drafter_options": {"max_nodes": "many"}}, "max_nodes must be of type int, got 'many'"),
        ({"drafter": "ngram", "drafter_options": {"max_nodes": "0"}}, "max_nodes must be at least 1, got 0"),
        ({"drafter": "model"}, "needs a draft model"),
        ({"drafter": "none", "verifier": "copled"}, "did you mean 'coupled'"),
        ({"drafter": "none", "on_drafter_error": "ignore"}, "'warn' or 'raise', got 'ignore'"),
    ],
)
def test_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecDecoder(random_model(), **arguments)


def test_the_greedy_verifier_refuses_to_sample() -> None:
    with pytest.raises(ValueError, match="temperature 0"):
        SpecDecoder(random_model(), "none", verifier="greedy").generate([1], temperature=0.5)


def test_draft_and_target_vocabularies_must_agree() -> None:
    small = ModelDrafter(model=random_model(vocab_size=50))
    with pytest.raises(ValueError, match="vocabulary of 50, the target of 97"):
        SpecDecoder(random_model(), small)


class FakeTokenizer:
    """Knows only its vocabulary."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}


def test_tokenizers_of_the_same_size_must_agree() -> None:
    drafter = ModelDrafter(model=random_model(), tokenizer=FakeTokenizer("a", "b"))
    with pytest.raises(ValueError, match="tokenizers differ: 'a' is 0 for the draft model and 1 for the target"):
        SpecDecoder(random_model(), drafter, tokenizer=FakeTokenizer("b", "a"))


def test_a_lossless_policy_given_as_an_object_is_greedy_at_temperature_0() -> None:
    model = random_model()
    expected = SpecDecoder(model, "none").generate([1, 2, 3], max_new_tokens=12).token_ids
    result = SpecDecoder(model, "none", verifier=CoupledVerifier()).generate([1, 2, 3], max_new_tokens=12, seed=1)
    assert (result.token_ids, result.stats.verifier) == (expected, "greedy")


def test_numpy_integers_are_token_ids(decoder: SpecDecoder) -> None:
    expected = decoder.generate([1, 2, 3], max_new_tokens=4).token_ids
    assert decoder.generate(list(np.array([1, 2, 3])), max_new_tokens=4).token_ids == expected
